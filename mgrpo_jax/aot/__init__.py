"""What compiled programs say about memory, time and communication."""
