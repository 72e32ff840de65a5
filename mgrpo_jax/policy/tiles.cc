// Products of float32 tokens with a kernel in tiles, see tiles.py.
//
// A tile is all inputs of kColumns outputs, [inputs, kColumns]. A block of up to
// kRows tokens meets a tile in registers: kRows × kVectors sums, to which each
// input adds once, in order. So a token's products do not depend on how many
// others there are, nor on which thread computes them.
//
// Tiles are taken from a counter by the threads that XLA has, the calling one
// among them, so no core waits for a share that another was given, and none
// waits for a thread that never comes.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Sums, a row of outputs and an input fill the registers but for a few.
#if defined(__AVX512F__)  // 32 of 16 floats
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX__)  // 16 of 8
constexpr int kLanes = 8, kRows = 6;
#else  // 32 of 4 (Neon), or 16
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kColumns = kLanes * kVectors;
constexpr int64_t kLine = 64;    // bytes fetched at a time
constexpr int64_t kShares = 8;   // of the tiles, for each thread
constexpr int kSpins = 1 << 12;  // looks before others may have the core

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

class Product {
 public:
  Product(const float* tokens, const float* tiles, float* out, int64_t rows,
          int64_t inputs, int64_t tiles_number, int64_t threads)
      : tokens_(tokens), tiles_(tiles), out_(out), rows_(rows),
        inputs_(inputs), number_(tiles_number),
        share_(std::max<int64_t>(1, tiles_number / (threads * kShares))) {}

  // Multiplies with tiles until all are taken.
  void Work() {
    for (;;) {
      const int64_t first = taken_.fetch_add(share_);
      if (first >= number_) return;
      const int64_t last = std::min(first + share_, number_);
      for (int64_t tile = first; tile < last; ++tile) Multiply(tile);
      done_.fetch_add(last - first, std::memory_order_release);
    }
  }

  // Waits for those that others have taken.
  void Wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < number_;) {
      if (spins < kSpins) {
        ++spins;
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  // Multiplies all tokens with a tile, in blocks of nearly equal size.
  void Multiply(int64_t tile) const {
    const int64_t blocks = (rows_ + kRows - 1) / kRows;
    const int64_t size = inputs_ * kColumns;
    const float* weights = tiles_ + tile * size;
    const int64_t lines =
        tile + 1 < number_ ? size * sizeof(float) / kLine / blocks + 1 : 0;
    const char* next = reinterpret_cast<const char*>(weights + size);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * rows_ / blocks;
      const int64_t last = (block + 1) * rows_ / blocks;
      const int64_t outputs = number_ * kColumns;
      MultiplyUpTo<kRows>(last - first, tokens_ + first * inputs_, weights,
                          out_ + first * outputs + tile * kColumns, inputs_,
                          outputs, next + block * lines * kLine, lines);
    }
  }

  const float* const tokens_;
  const float* const tiles_;
  float* const out_;
  const int64_t rows_, inputs_, number_, share_;
  std::atomic<int64_t> taken_{0}, done_{0};
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
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto product = std::make_shared<Product>(
      tokens.typed_data(), tiles.typed_data(), out->typed_data(), rows, inputs,
      number, threads);
  for (int64_t thread = 1; thread < std::min(threads, number); ++thread) {
    pool.Schedule([product] { product->Work(); });
  }
  product->Work();
  product->Wait();
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
