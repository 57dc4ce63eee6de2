// Tiles: rows of a batch, packed as [columns][T], so that a weight meets T neighbouring numbers.
//
// Compilers lower the vectors of 64 bytes to what the processor has.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

template <class Real>
struct Lanes {
    typedef Real type __attribute__((vector_size(64), aligned(sizeof(Real)), may_alias));
    static constexpr int count = 64 / sizeof(Real);
};

template <class Real>
using Buffer = std::unique_ptr<Real[]>;

template <class Real>
Buffer<Real> uninitialised(int64_t size) {
    return Buffer<Real>(new Real[size]);
}

template <class Real>
typename Lanes<Real>::type load(const Real* from) {
    return *reinterpret_cast<const typename Lanes<Real>::type*>(from);
}

template <class Real>
void store(Real* to, typename Lanes<Real>::type lanes) {
    *reinterpret_cast<typename Lanes<Real>::type*>(to) = lanes;
}

template <class Real>
Real sum_of(typename Lanes<Real>::type lanes) {
    Real sum = 0;
    for (int i = 0; i < Lanes<Real>::count; ++i) sum += lanes[i];
    return sum;
}

// Rows beyond the batch, and columns from `width` to `padded`, become zeros.
template <class Real, int T>
void pack(const Real* x, int64_t batch, int64_t width, int64_t padded, int64_t tile, Real* packed) {
    for (int64_t first = 0; first < padded; first += 16) {
        const int64_t last = std::min(first + 16, padded), given = std::min(last, width);
        for (int lane = 0; lane < T; ++lane) {
            const int64_t row = tile * T + lane;
            int64_t i = first;
            if (row < batch) {
                for (; i < given; ++i) packed[i * T + lane] = x[row * width + i];
            }
            for (; i < last; ++i) packed[i * T + lane] = Real{0};
        }
    }
}

template <class Real, int T>
void unpack(const Real* packed, int64_t batch, int64_t width, int64_t tile, const Real* bias, Real* x) {
    const int64_t rows = std::min<int64_t>(T, batch - tile * T);
    for (int64_t first = 0; first < width; first += 16) {
        const int64_t last = std::min(first + 16, width);
        for (int64_t lane = 0; lane < rows; ++lane) {
            Real* out = x + (tile * T + lane) * width;
            for (int64_t i = first; i < last; ++i) out[i] = packed[i * T + lane] + (bias ? bias[i] : Real{0});
        }
    }
}

template <class Real, int T>
Buffer<Real> packed_tiles(const Real* x, int64_t batch, int64_t width, int64_t padded, int threads) {
    const int64_t tiles = (batch + T - 1) / T;
    Buffer<Real> packed = uninitialised<Real>(tiles * padded * T);
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        pack<Real, T>(x, batch, width, padded, tile, packed.get() + tile * padded * T);
    }
    return packed;
}

// How many parts share a sum, each with one of `bytes` of its own: not more than there is work for, nor 64 MB.
inline int64_t shares(int64_t wanted, int64_t work, int64_t bytes) {
    return std::max<int64_t>(1, std::min({wanted, work, (int64_t{1} << 26) / std::max<int64_t>(1, bytes)}));
}

// The rows of all tiles, of which each is the sum of its parts.
template <class Real, int T>
void unpack_sums(Real* sums, int64_t parts, int64_t size, int64_t batch, int64_t width, Real* x, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < (batch + T - 1) / T; ++tile) {
        Real* sum = sums + tile * parts * size;
        for (int64_t part = 1; part < parts; ++part) {
            for (int64_t i = 0; i < size; ++i) sum[i] += sum[part * size + i];
        }
        unpack<Real, T>(sum, batch, width, tile, nullptr, x);
    }
}
