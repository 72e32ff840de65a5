"""Commands: train, evaluate, view, and the benchmarks."""
