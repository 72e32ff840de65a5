"""What a CPU runs by programs of this project's own, in C++."""
