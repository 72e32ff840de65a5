"""What XLA calls the programs of this folder, and the functions they are."""

MULTIPLY_TILES = "mgrpo_multiply_tiles"
ATTEND_STREAMS = "mgrpo_attend_streams"
HANDLERS = {
    MULTIPLY_TILES: "MgrpoMultiplyTiles",
    ATTEND_STREAMS: "MgrpoAttendStreams",
}
