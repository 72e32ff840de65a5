// Attention of each stream's newest tokens to the stream, see streams.py.
//
// A head of up to kNeighbours of a stream's tokens is a part of the work. What
// they see is met in order, a piece of up to kPiece tokens at a time, by an
// online softmax (arXiv 1805.02867): a piece by one of them after the other,
// while it is near, by up to kQueries of the queries that share keys at once.
// How a token's sums are associated depends on how many queries share keys and
// on where the tokens stand that it sees, on nothing else.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "shares.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kLanes = 8;    // one register of AVX, two of Neon
constexpr int kPiece = 64;   // tokens
constexpr int kQueries = 4;
constexpr int kNeighbours = 8;
constexpr int kVectors = 4;  // of each query, for up to 3; with 4, 2
constexpr float kMasked = -1e30f;  // online.MASKED: no real score comes near

typedef float Vector
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Integers
    __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

template <int queries>
constexpr int kHeld = queries > 3 ? kVectors / 2 : kVectors;

const Vector& Load(const float* from) {
  return *reinterpret_cast<const Vector*>(from);
}

Vector& Place(float* at) { return *reinterpret_cast<Vector*>(at); }

// e^x to 2 units in the last place, for x <= 0; 0 below -87, NaN of NaN. As in
// Cephes: e^x = 2^n e^r, r in ±log(2)/2, and a polynomial for e^r.
Vector Exp(Vector x) {
  const float shift = 12582912.0f;  // 1.5 · 2^23, whose sums are integers
  const Vector shifted = x * 1.44269504088896341f + shift;
  const Vector n = shifted - shift;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vector{} : p * power;
}

// Tokens of a head: keys [D, size] and values [size, D].
struct Tokens {
  const float* keys;
  const float* values;
  int64_t size;
};

// The queries of a head, and what they have seen.
template <int queries>
struct Seen {
  const float* query;  // [queries, D]
  float* values;       // [queries, D], sums of weighted values
  int64_t dim;         // D
  float peak[queries], total[queries];
};

// Multiplies queries with the keys of kLanes × vectors tokens.
template <int queries, int vectors>
void ScoreVectors(const Seen<queries>& seen, const float* __restrict keys,
                  int64_t size, float (*__restrict scores)[kPiece]) {
  Vector sums[queries][vectors] = {};
  for (int64_t d = 0; d < seen.dim; ++d) {
    for (int v = 0; v < vectors; ++v) {
      const Vector key = Load(keys + d * size + v * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < queries; ++q) {
        sums[q][v] += seen.query[q * seen.dim + d] * key;
      }
    }
  }
  for (int q = 0; q < queries; ++q) {
    for (int v = 0; v < vectors; ++v) Place(scores[q] + v * kLanes) = sums[q][v];
  }
}

// Multiplies queries with the keys of `number` tokens; `room` ones lie there.
template <int queries>
void Score(const Seen<queries>& seen, const float* keys, int64_t size,
           int64_t number, int64_t room, float (*scores)[kPiece]) {
  constexpr int held = kHeld<queries> * kLanes;
  int64_t c = 0;
  for (; c < number && c + held <= room; c += held) {
    ScoreVectors<queries, kHeld<queries>>(
        seen, keys + c, size,
        reinterpret_cast<float(*)[kPiece]>(scores[0] + c));
  }
  for (; c < number && c + kLanes <= room; c += kLanes) {
    ScoreVectors<queries, 1>(
        seen, keys + c, size,
        reinterpret_cast<float(*)[kPiece]>(scores[0] + c));
  }
  for (; c < number; ++c) {
    for (int q = 0; q < queries; ++q) {
      float sum = 0;
      for (int64_t d = 0; d < seen.dim; ++d) {
        sum += seen.query[q * seen.dim + d] * keys[d * size + c];
      }
      scores[q][c] = sum;
    }
  }
}

// Adds weighted values of tokens first to last, `vectors` of each.
template <int queries, int vectors>
void AddVectors(float* __restrict sums, int64_t dim, const float* scale,
                const float* __restrict values,
                const float (*__restrict weights)[kPiece], int64_t first,
                int64_t last) {
  Vector held[queries][vectors];
  for (int q = 0; q < queries; ++q) {
    for (int v = 0; v < vectors; ++v) {
      held[q][v] = Load(sums + q * dim + v * kLanes) * scale[q];
    }
  }
  for (int64_t c = first; c < last; ++c) {
    for (int v = 0; v < vectors; ++v) {
      const Vector value = Load(values + c * dim + v * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < queries; ++q) held[q][v] += weights[q][c] * value;
    }
  }
  for (int q = 0; q < queries; ++q) {
    for (int v = 0; v < vectors; ++v) {
      Place(sums + q * dim + v * kLanes) = held[q][v];
    }
  }
}

// Scales what was summed, and adds weighted values of tokens first to last.
template <int queries>
void Add(Seen<queries>& seen, const float* scale, const float* values,
         const float (*weights)[kPiece], int64_t first, int64_t last) {
  constexpr int held = kHeld<queries> * kLanes;
  int64_t d = 0;
  for (; d + held <= seen.dim; d += held) {
    AddVectors<queries, kHeld<queries>>(seen.values + d, seen.dim, scale,
                                        values + d, weights, first, last);
  }
  for (; d + kLanes <= seen.dim; d += kLanes) {
    AddVectors<queries, 1>(seen.values + d, seen.dim, scale, values + d,
                           weights, first, last);
  }
  for (; d < seen.dim; ++d) {
    for (int q = 0; q < queries; ++q) {
      float sum = seen.values[q * seen.dim + d] * scale[q];
      for (int64_t c = first; c < last; ++c) {
        sum += weights[q][c] * values[c * seen.dim + d];
      }
      seen.values[q * seen.dim + d] = sum;
    }
  }
}

// Meets tokens first to last of a piece that begins at `start`.
template <int queries>
void MeetPiece(Seen<queries>& seen, const Tokens& tokens, int64_t start,
               int64_t first, int64_t last) {
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const int64_t room = std::min<int64_t>(kPiece, tokens.size - start);
  float scores[queries][kPiece], scale[queries];
  Score(seen, tokens.keys + start, tokens.size, last, room, scores);
  const int64_t end = (last + kLanes - 1) / kLanes * kLanes;
  for (int q = 0; q < queries; ++q) {
    std::fill(scores[q], scores[q] + first, nothing);
    std::fill(scores[q] + last, scores[q] + end, nothing);
    Vector highest = Vector{} + seen.peak[q];
    for (int64_t c = 0; c < end; c += kLanes) {
      const Vector score = Load(scores[q] + c);
      highest = score > highest ? score : highest;
    }
    float peak = highest[0];
    for (int lane = 1; lane < kLanes; ++lane) {
      peak = std::max(peak, highest[lane]);
    }
    Vector sums = {};
    for (int64_t c = 0; c < end; c += kLanes) {
      sums += Place(scores[q] + c) = Exp(Load(scores[q] + c) - peak);
    }
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    scale[q] = Exp(Vector{} + (seen.peak[q] - peak))[0];
    seen.total[q] = seen.total[q] * scale[q] + sum;
    seen.peak[q] = peak;
  }
  Add(seen, scale, tokens.values + start * seen.dim, scores, first, last);
}

struct Attention {
  const float* query;      // [P, T, Hkv, G, D]
  const int32_t* lengths;  // [P]
  const int32_t* slots;    // [P]
  float* out;              // [P, T, Hkv, G, D]
  std::vector<Tokens> blocks;  // of the first head of the first slot; then own
  int64_t count, heads, group, dim, step, window;  // count is T

  // Parts of a head of a row.
  int64_t Parts() const { return (count + kNeighbours - 1) / kNeighbours; }

  // Attends for all queries that share a head of some tokens.
  void operator()(int64_t part) const {
    const int64_t head = part / Parts(), token = part % Parts() * kNeighbours;
    for (int64_t first = 0; first < group; first += kQueries) {
      AttendUpTo<kQueries>(std::min<int64_t>(kQueries, group - first), head,
                           token, first);
    }
  }

 private:
  // Finds the function for a number of queries, 1 to `queries`.
  template <int queries, typename... Arguments>
  void AttendUpTo(int64_t number, Arguments... arguments) const {
    if constexpr (queries > 0) {
      if (number == queries) {
        Attend<queries>(arguments...);
      } else {
        AttendUpTo<queries - 1>(number, arguments...);
      }
    }
  }

  // Attends from up to kNeighbours tokens, for head [P, Hkv].
  template <int queries>
  void Attend(int64_t head, int64_t token, int64_t first) const {
    const int64_t row = head / heads, number = head % heads;
    const int64_t length = std::max<int64_t>(0, lengths[row]);
    const int64_t near = std::min<int64_t>(kNeighbours, count - token);
    Seen<queries> seen[kNeighbours];
    for (int64_t n = 0; n < near; ++n) {
      const int64_t at =
          (((row * count + token + n) * heads + number) * group + first) * dim;
      seen[n] = {query + at, out + at, dim, {}, {}};
      std::fill(seen[n].peak, seen[n].peak + queries, kMasked);
      std::fill(seen[n].values, seen[n].values + queries * dim, 0.0f);
    }
    const int64_t fed = step + token + 1;  // of the first's own, with itself
    const int64_t from = window ? length + fed - window : 0;
    int64_t begin = 0;  // of the block, in the stream
    for (size_t i = 0; i < blocks.size(); ++i) {
      const bool own = i + 1 == blocks.size();
      if (own) begin = length;
      Tokens tokens = blocks[i];
      const int64_t of = (own ? row : slots[row]) * heads + number;
      tokens.keys += of * dim * tokens.size;
      tokens.values += of * dim * tokens.size;
      const int64_t last = own ? fed : std::min(tokens.size, length - begin);
      Meet(seen, near, tokens, from - begin, last, window != 0, own);
      begin += tokens.size;
    }
    for (int64_t n = 0; n < near; ++n) {
      for (int64_t d = 0; d < queries * dim; ++d) {
        seen[n].values[d] /= seen[n].total[d / dim];
      }
    }
  }

  // Meets tokens first to last of a block; each neighbour's begin later by one
  // where there is a window, and end later where they are its own.
  template <int queries>
  static void Meet(Seen<queries>* seen, int64_t near, const Tokens& tokens,
                   int64_t first, int64_t last, bool begins, bool ends) {
    const int64_t end = last + (ends ? near - 1 : 0);
    for (int64_t start = std::max<int64_t>(0, first) / kPiece * kPiece;
         start < end; start += kPiece) {
      for (int64_t n = 0; n < near; ++n) {
        const int64_t low =
            std::max<int64_t>(0, first + (begins ? n : 0) - start);
        const int64_t high =
            std::min<int64_t>(kPiece, last + (ends ? n : 0) - start);
        if (low < high) MeetPiece(seen[n], tokens, start, low, high);
      }
    }
  }
};

using Queries = ffi::Buffer<ffi::F32, 5>;

ffi::Error Attend(ffi::ThreadPool pool, Queries query,
                  ffi::BufferR1<ffi::S32> lengths,
                  ffi::BufferR1<ffi::S32> slots, ffi::BufferR0<ffi::S32> step,
                  ffi::RemainingArgs blocks, ffi::Result<Queries> out,
                  int64_t window) {
  const auto shape = query.dimensions();
  const int64_t rows = shape[0], heads = shape[2], dim = shape[4];
  Attention attention{query.typed_data(),
                      lengths.typed_data(),
                      slots.typed_data(),
                      out->typed_data(),
                      {},
                      shape[1],
                      heads,
                      shape[3],
                      dim,
                      step.typed_data()[0],
                      window};
  const auto wrong = ffi::Error::InvalidArgument(
      "queries, lengths, slots, blocks and step do not belong together");
  if (static_cast<int64_t>(lengths.dimensions()[0]) != rows ||
      static_cast<int64_t>(slots.dimensions()[0]) != rows ||
      out->element_count() != query.element_count() ||
      blocks.size() % 2 != 0) {
    return wrong;
  }
  for (size_t i = 0; i < blocks.size(); i += 2) {
    const bool own = i + 2 == blocks.size();
    auto keys = blocks.get<ffi::BufferR4<ffi::F32>>(i);
    auto values = blocks.get<ffi::BufferR4<ffi::F32>>(i + 1);
    if (!keys.has_value()) return keys.error();
    if (!values.has_value()) return values.error();
    const auto turned = keys->dimensions(), straight = values->dimensions();
    const int64_t streams = straight[0], size = straight[2];
    if (turned[0] != streams || turned[1] != heads || turned[2] != dim ||
        turned[3] != size || straight[1] != heads || straight[3] != dim ||
        (own && streams != rows)) {
      return wrong;
    }
    for (int64_t row = 0; !own && row < rows; ++row) {
      if (attention.slots[row] < 0 || attention.slots[row] >= streams) {
        return wrong;
      }
    }
    attention.blocks.push_back({keys->typed_data(), values->typed_data(), size});
  }
  if (attention.blocks.empty() || attention.step < 0 ||
      attention.step + attention.count > attention.blocks.back().size ||
      window < 0) {
    return wrong;
  }
  const int64_t parts = rows * heads * attention.Parts();
  if (parts > 0) mgrpo::Share(pool, parts, std::move(attention));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MgrpoAttendStreams, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Queries>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<Queries>()
                                  .Attr<int64_t>("window"));
