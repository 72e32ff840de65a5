// Products of float32 tokens with a kernel in tiles, see tiles.py.
//
// A tile is all inputs of kColumns outputs, [inputs, kColumns]. A block of up to
// kRows tokens meets a tile in registers: kRows × kVectors sums, to which each
// input adds once, in order. So a token's products do not depend on how many
// others there are, nor on which thread computes them.

#include <cstdint>

#include "shares.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// With AVX sums, a row of outputs and an input fill the registers but for a
// few; Neon has twice as many.
#if defined(__AVX512F__)  // 32 of 16 floats
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX__)  // 16 of 8
constexpr int kLanes = 8, kRows = 6;
#else  // 32 of 4 (Neon), or 16
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kColumns = kLanes * kVectors;
constexpr int64_t kLine = 64;  // bytes fetched at a time

typedef float Vector
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// Multiplies `rows` tokens with a tile, and fetches a part of the next one.
template <int rows>
void MultiplyRows(const float* __restrict tokens, const float* __restrict tile,
                  float* __restrict out, int64_t inputs, int64_t outputs,
                  const char* __restrict next, int64_t lines) {
  Vector sums[rows][kVectors] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    if (i < lines) __builtin_prefetch(next + i * kLine, 0, 2);
    Vector weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] =
          *reinterpret_cast<const Vector*>(tile + i * kColumns + v * kLanes);
#if defined(__AVX__)  // else they are loaded again for every row
      asm("" : "+v"(weights[v]));
#endif
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] += tokens[row * inputs + i] * weights[v];
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vector*>(out + row * outputs + v * kLanes) =
          sums[row][v];
    }
  }
}

// Finds the function for a number of tokens, 1 to `rows`.
template <int rows, typename... Arguments>
void MultiplyUpTo(int64_t number, Arguments... arguments) {
  if constexpr (rows > 0) {
    if (number == rows) {
      MultiplyRows<rows>(arguments...);
    } else {
      MultiplyUpTo<rows - 1>(number, arguments...);
    }
  }
}

struct Product {
  const float* tokens;
  const float* tiles;
  float* out;
  int64_t rows, inputs, number;  // of tokens, of each, of tiles

  // Multiplies all tokens with a tile, in blocks of nearly equal size.
  void operator()(int64_t tile) const {
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const int64_t size = inputs * kColumns;
    const float* weights = tiles + tile * size;
    const int64_t lines =
        tile + 1 < number ? size * sizeof(float) / kLine / blocks + 1 : 0;
    const char* next = reinterpret_cast<const char*>(weights + size);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * rows / blocks;
      const int64_t last = (block + 1) * rows / blocks;
      const int64_t outputs = number * kColumns;
      MultiplyUpTo<kRows>(last - first, tokens + first * inputs, weights,
                          out + first * outputs + tile * kColumns, inputs,
                          outputs, next + block * lines * kLine, lines);
    }
  }
};

ffi::Error Multiply(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> tokens,
                    ffi::BufferR3<ffi::F32> tiles,
                    ffi::ResultBufferR2<ffi::F32> out) {
  const int64_t rows = tokens.dimensions()[0];
  const int64_t inputs = tokens.dimensions()[1];
  const int64_t number = tiles.dimensions()[0];
  if (tiles.dimensions()[1] != inputs || tiles.dimensions()[2] != kColumns ||
      out->dimensions()[0] != rows ||
      out->dimensions()[1] != number * kColumns) {
    return ffi::Error::InvalidArgument("tokens, tiles and products differ");
  }
  if (rows == 0) return ffi::Error::Success();
  mgrpo::Share(pool, number,
               Product{tokens.typed_data(), tiles.typed_data(),
                       out->typed_data(), rows, inputs, number});
  return ffi::Error::Success();
}

}  // namespace

// Outputs of a tile.
extern "C" int MgrpoTileColumns() { return kColumns; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(MgrpoMultiplyTiles, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
