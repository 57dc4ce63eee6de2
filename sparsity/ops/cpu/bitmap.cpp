// A weight as a bitmap and its kept values: y = x W^T for a few rows x, and its rows in full and back. See bitmap.py.

#include <cstring>
#include <type_traits>

#include "tiles.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SPARSITY_AVX512
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // what GCC's own header says is undefined on purpose
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kRows = 32;  // rows of the weight that a thread takes at a time

// Bit j of byte i of a row says whether column 8 i + j is kept; the values of row r, in order, begin at starts[r].
// Values are moved as what they are to memory: numbers of 2, 4 or 8 bytes.
template <class Value>
struct Bitmap {
    const Value* values;
    const uint8_t* bits;
    const int64_t* starts;
    int64_t rows, width;

    using Cell = std::conditional_t<sizeof(Value) == 8, uint64_t, uint32_t>;  // what a value is in a vector
    using Lane = typename Lanes<Cell>::type;
    static constexpr int lanes = Lanes<Cell>::count;  // 8 or 16, the columns of a chunk

    int64_t bytes() const { return (width + 7) / 8; }
    int64_t chunks() const { return (width + lanes - 1) / lanes; }
    const Value* end() const { return values + starts[rows]; }

    // The bits of a chunk; whether its second byte is there is said by `whole`.
    static unsigned mask(const uint8_t* row, int64_t chunk, bool whole) {
        const uint8_t* at = row + chunk * (lanes / 8);
        return lanes == 16 && whole ? at[0] | static_cast<unsigned>(at[1]) << 8 : at[0];
    }
    bool whole(int64_t chunk) const { return chunk * (lanes / 8) + lanes / 8 <= bytes(); }
};

// spread: the next values where bits of the mask are set, and zeros elsewhere; nothing is read from `left` values on.
// collect: the other way, to as many values as there are bits.
#ifdef SPARSITY_AVX512

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

inline __m512i spread(unsigned mask, const uint16_t* values, int64_t left) {
    const __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(left), values));
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), next);
}

inline __m512i spread(unsigned mask, const uint32_t* values, int64_t left) {
    const __m512i next = left >= 16 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi32(first(left), values);
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), next);
}

inline __m512i spread(unsigned mask, const uint64_t* values, int64_t left) {
    const __mmask8 given = static_cast<__mmask8>(first(std::min<int64_t>(left, 8)));
    return _mm512_maskz_expand_epi64(static_cast<__mmask8>(mask), _mm512_maskz_loadu_epi64(given, values));
}

inline void collect(unsigned mask, __m512i lanes, uint16_t* values) {
    const __m512i found = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), lanes);
    _mm256_mask_storeu_epi16(values, first(__builtin_popcount(mask)), _mm512_cvtepi32_epi16(found));
}

inline void collect(unsigned mask, __m512i lanes, uint32_t* values) {
    const __m512i found = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), lanes);
    _mm512_mask_storeu_epi32(values, first(__builtin_popcount(mask)), found);
}

inline void collect(unsigned mask, __m512i lanes, uint64_t* values) {
    const __m512i found = _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), lanes);
    _mm512_mask_storeu_epi64(values, static_cast<__mmask8>(first(__builtin_popcount(mask))), found);
}

#else

template <class Value>
typename Bitmap<Value>::Lane spread(unsigned mask, const Value* values, int64_t) {
    typename Bitmap<Value>::Lane found = {};
    for (; mask; mask &= mask - 1) found[__builtin_ctz(mask)] = *values++;
    return found;
}

template <class Value>
void collect(unsigned mask, typename Bitmap<Value>::Lane lanes, Value* values) {
    for (; mask; mask &= mask - 1) *values++ = static_cast<Value>(lanes[__builtin_ctz(mask)]);
}

#endif

// Some rows of the weight, in full, to [count, width].
template <class Value>
void expand(const Bitmap<Value>& w, int64_t from, int64_t count, Value* to, int threads) {
    using Lane = typename Bitmap<Value>::Lane;
    typedef Value Narrow __attribute__((vector_size(Bitmap<Value>::lanes * sizeof(Value))));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = from; row < from + count; ++row) {
        const Value* next = w.values + w.starts[row];
        for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
            const unsigned mask = w.mask(w.bits + row * w.bytes(), chunk, w.whole(chunk));
            const Narrow found = __builtin_convertvector((Lane)spread(mask, next, w.end() - next), Narrow);
            const int64_t first = chunk * w.lanes, columns = std::min<int64_t>(w.lanes, w.width - first);
            Value* place = to + (row - from) * w.width + first;
            if (columns == w.lanes) std::memcpy(place, &found, sizeof found);
            else std::memcpy(place, &found, columns * sizeof(Value));
            next += __builtin_popcount(mask);
        }
    }
}

// The values of some rows, out of these in full, [count, width]: the other way.
template <class Value>
void gather(const Bitmap<Value>& w, int64_t from, int64_t count, const Value* dense, Value* values, int threads) {
    using Lane = typename Bitmap<Value>::Lane;
    typedef Value Narrow __attribute__((vector_size(Bitmap<Value>::lanes * sizeof(Value))));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = from; row < from + count; ++row) {
        Value* next = values + w.starts[row];
        for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
            const unsigned mask = w.mask(w.bits + row * w.bytes(), chunk, w.whole(chunk));
            const int64_t first = chunk * w.lanes, columns = std::min<int64_t>(w.lanes, w.width - first);
            Narrow found = {};
            const Value* place = dense + (row - from) * w.width + first;
            if (columns == w.lanes) std::memcpy(&found, place, sizeof found);
            else std::memcpy(&found, place, columns * sizeof(Value));
            const Lane wide = __builtin_convertvector(found, Lane);
#ifdef SPARSITY_AVX512
            collect(mask, (__m512i)wide, next);
#else
            collect(mask, wide, next);
#endif
            next += __builtin_popcount(mask);
        }
    }
}

// The numbers that values are: those of 2 bytes are the upper halves of floats (bfloat16).
template <class Value>
using Number = std::conditional_t<sizeof(Value) == 8, double, float>;

// R rows of the weight meet T rows of the batch, [chunks][T][lanes]; the results are y[t * rows + r], while there are.
// Several rows are not the last ones, so that a whole vector of values is there to be read: to ask would be slower.
template <int R, int T, class Value, class Real = Number<Value>>
void products(const Bitmap<Value>& w, int64_t row, const Real* x, const Real* bias, Real* y, int64_t there) {
    using Lane = typename Lanes<Real>::type;
    const Value *next[R], *const end = w.end();
    for (int r = 0; r < R; ++r) next[r] = w.values + w.starts[row + r];
    const uint8_t* bits = w.bits + row * w.bytes();
    Lane sums[R][T] = {};
    for (int64_t chunk = 0; chunk < w.chunks(); ++chunk, x += T * w.lanes) {
        const bool whole = w.whole(chunk);
        Lane weights[R];
        for (int r = 0; r < R; ++r) {
            const unsigned mask = w.mask(bits + r * w.bytes(), chunk, whole);
            const auto cells = (typename Bitmap<Value>::Lane)spread(mask, next[r], R > 1 ? w.lanes : end - next[r]);
            weights[r] = (Lane)(sizeof(Value) == 2 ? cells << 16 : cells);
            next[r] += __builtin_popcount(mask);
        }
        for (int t = 0; t < T; ++t) {
            const Lane mine = load(x + t * w.lanes);
            for (int r = 0; r < R; ++r) sums[r][t] += weights[r] * mine;
        }
    }
    for (int t = 0; t < there; ++t) {
        for (int r = 0; r < R; ++r) y[t * w.rows + row + r] = sum_of<Real>(sums[r][t]) + (bias ? bias[row + r] : Real{0});
    }
}

// T rows of a batch as [chunks][T][lanes], with zeros beyond the batch and the width.
template <int T, class Real>
Buffer<Real> packed_chunks(const Real* x, int64_t there, int64_t width, int64_t chunks) {
    constexpr int64_t lanes = Lanes<Real>::count;
    Buffer<Real> packed = uninitialised<Real>(chunks * T * lanes);
    for (int64_t i = 0; i < chunks * lanes; ++i) {
        for (int64_t t = 0; t < T; ++t) {
            packed[(i / lanes * T + t) * lanes + i % lanes] = t < there && i < width ? x[t * width + i] : Real{0};
        }
    }
    return packed;
}

template <int R, int T, class Value, class Real = Number<Value>>
void forward(const Bitmap<Value>& w, const Real* x, int64_t batch, const Real* bias, Real* y, int threads) {
    for (int64_t first = 0; first < batch; first += T, x += T * w.width, y += T * w.rows) {
        const int64_t there = std::min<int64_t>(T, batch - first);
        const Buffer<Real> in = packed_chunks<T>(x, there, w.width, w.chunks());
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t part = 0; part < (w.rows + kRows - 1) / kRows; ++part) {
            const int64_t end = std::min(w.rows, (part + 1) * kRows), last = w.starts[w.rows] - w.lanes;
            int64_t row = part * kRows;
            for (; row + R <= end && w.starts[row + R] <= last; row += R) products<R, T>(w, row, in.get(), bias, y, there);
            for (; row < end; ++row) products<1, T>(w, row, in.get(), bias, y, there);
        }
    }
}

// Calls `body` with the weight in its own type.
template <class Body>
int typed(const void* values, int size, const uint8_t* bits, const int64_t* starts, int64_t rows, int64_t width,
          Body body) {
    auto given = [&](auto value) {
        using Value = decltype(value);
        body(Bitmap<Value>{static_cast<const Value*>(values), bits, starts, rows, width}, value);
    };
    try {
        if (size == 8) given(uint64_t{});
        else if (size == 4) given(uint32_t{});
        else given(uint16_t{});
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {

// All matrices are contiguous. Each returns 0, or 1 where there is no memory for its work.

// x [batch, width], bias [rows] and y [batch, rows] are float, or double where values have 8 bytes; values of 2 bytes
// are bfloat16.
int sparsity_bitmap(const void* values, int size, const uint8_t* bits, const int64_t* starts, int64_t rows,
                    int64_t width, const void* x, int64_t batch, const void* bias, void* y, int threads) {
    return typed(values, size, bits, starts, rows, width, [&](const auto& w, auto value) {
        using Real = Number<decltype(value)>;
        const Real *from = static_cast<const Real*>(x), *added = static_cast<const Real*>(bias);
        if (batch == 1) forward<8, 1>(w, from, batch, added, static_cast<Real*>(y), threads);
        else if (batch == 2) forward<8, 2>(w, from, batch, added, static_cast<Real*>(y), threads);
        else forward<4, 4>(w, from, batch, added, static_cast<Real*>(y), threads);
    });
}

// Writes rows [first, first + count) of the weight, in full, to `dense`.
int sparsity_bitmap_expand(const void* values, int size, const uint8_t* bits, const int64_t* starts, int64_t rows,
                           int64_t width, int64_t first, int64_t count, void* dense, int threads) {
    return typed(values, size, bits, starts, rows, width, [&](const auto& w, auto value) {
        expand(w, first, count, static_cast<decltype(value)*>(dense), threads);
    });
}

// Writes the values of rows [first, first + count), which `dense` has in full.
int sparsity_bitmap_gather(void* values, int size, const uint8_t* bits, const int64_t* starts, int64_t rows,
                           int64_t width, int64_t first, int64_t count, const void* dense, int threads) {
    return typed(values, size, bits, starts, rows, width, [&](const auto& w, auto value) {
        using Value = decltype(value);
        gather(w, first, count, static_cast<const Value*>(dense), static_cast<Value*>(values), threads);
    });
}
}
