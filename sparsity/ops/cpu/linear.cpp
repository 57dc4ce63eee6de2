// Products with a weight in compressed rows: y = x W^T, x' = y W, and the slope of each kept weight. See linear.py.

#include <cstring>

#include "tiles.h"

namespace {

constexpr int64_t kRows = 256;  // rows of the weight that a thread takes at a time
constexpr int kWays = 8;        // sums of a row, none of which waits for another

// A weight of [rows, columns] in compressed rows: those of row r are at starts[r] .. starts[r + 1].
template <class Real, class Index>
struct Weight {
    const Real* values;
    const Index* columns;
    const int64_t* starts;
    int64_t rows, width;
};

template <class Real, class Index, int T>
void forward(const Weight<Real, Index>& w, const Real* x, int64_t batch, const Real* bias, Real* y, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, parts = (w.rows + kRows - 1) / kRows;
    const Buffer<Real> in = packed_tiles<Real, T>(x, batch, w.width, w.width, threads);
    Buffer<Real> out = uninitialised<Real>(tiles * w.rows * T);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t part = 0; part < parts; ++part) {
            const Real* from = in.get() + tile * w.width * T;
            for (int64_t row = part * kRows; row < std::min(w.rows, (part + 1) * kRows); ++row) {
                Lane sums[count] = {};
                for (int64_t p = w.starts[row]; p < w.starts[row + 1]; ++p) {
                    const Real* column = from + static_cast<int64_t>(w.columns[p]) * T;
                    for (int i = 0; i < count; ++i) {
                        sums[i] += w.values[p] * load(column + i * lanes);
                    }
                }
                Real* to = out.get() + (tile * w.rows + row) * T;
                for (int i = 0; i < count; ++i) store(to + i * lanes, sums[i]);
            }
        }
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        unpack<Real, T>(out.get() + tile * w.rows * T, batch, w.rows, tile, bias, y);
    }
}

template <class Real, class Index>
void forward_one(const Weight<Real, Index>& w, const Real* x, const Real* bias, Real* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < w.rows; ++row) {
        Real sums[kWays] = {};
        int64_t p = w.starts[row];
        const int64_t end = w.starts[row + 1];
        for (; p + kWays <= end; p += kWays) {
            for (int i = 0; i < kWays; ++i) sums[i] += w.values[p + i] * x[w.columns[p + i]];
        }
        for (; p < end; ++p) sums[0] += w.values[p] * x[w.columns[p]];
        Real sum = bias ? bias[row] : Real{0};
        for (const Real each : sums) sum += each;
        y[row] = sum;
    }
}

// With fewer tiles than threads, threads share a tile's rows, each with sums of its own.
template <class Real, class Index, int T>
void to_input(const Weight<Real, Index>& w, const Real* y, int64_t batch, Real* x, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, size = w.width * T;
    const int64_t parts = shares(threads / tiles, w.rows / kRows, size * sizeof(Real));
    const Buffer<Real> in = packed_tiles<Real, T>(y, batch, w.rows, w.rows, threads);
    Buffer<Real> out = uninitialised<Real>(tiles * parts * size);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t part = 0; part < parts; ++part) {
            Real* to = out.get() + (tile * parts + part) * size;
            std::memset(to, 0, size * sizeof(Real));
            for (int64_t row = w.rows * part / parts; row < w.rows * (part + 1) / parts; ++row) {
                Lane slopes[count];
                const Real* from = in.get() + (tile * w.rows + row) * T;
                for (int i = 0; i < count; ++i) slopes[i] = load(from + i * lanes);
                for (int64_t p = w.starts[row]; p < w.starts[row + 1]; ++p) {
                    Real* column = to + static_cast<int64_t>(w.columns[p]) * T;
                    for (int i = 0; i < count; ++i) {
                        Real* place = column + i * lanes;
                        store(place, load(place) + w.values[p] * slopes[i]);
                    }
                }
            }
        }
    }
    unpack_sums<Real, T>(out.get(), parts, size, batch, w.width, x, threads);
}

template <class Real, class Index, int T>
void to_values(const Weight<Real, Index>& w, const Real* y, const Real* x, int64_t batch, Real* slopes, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, parts = (w.rows + kRows - 1) / kRows;
    const Buffer<Real> out = packed_tiles<Real, T>(y, batch, w.rows, w.rows, threads);
    const Buffer<Real> in = packed_tiles<Real, T>(x, batch, w.width, w.width, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int64_t row = part * kRows; row < std::min(w.rows, (part + 1) * kRows); ++row) {
                const Real* mine = out.get() + (tile * w.rows + row) * T;
                for (int64_t p = w.starts[row]; p < w.starts[row + 1]; ++p) {
                    const Real* column = in.get() + (tile * w.width + static_cast<int64_t>(w.columns[p])) * T;
                    Lane even = {}, odd = {};  // two sums, each of which waits for itself only
                    for (int i = 0; i < count; ++i) {
                        const Lane product = load(mine + i * lanes) * load(column + i * lanes);
                        if (i % 2) odd += product;
                        else even += product;
                    }
                    const Real sum = sum_of<Real>(even + odd);
                    slopes[p] = tile ? slopes[p] + sum : sum;
                }
            }
        }
    }
}

template <class Real, class Index>
void forward_any(const Weight<Real, Index>& w, const Real* x, int64_t batch, const Real* bias, Real* y, int threads) {
    if (batch <= 2) {
        for (int64_t i = 0; i < batch; ++i) forward_one(w, x + i * w.width, bias, y + i * w.rows, threads);
    } else if (batch <= 16) {
        forward<Real, Index, 16>(w, x, batch, bias, y, threads);
    } else if (batch <= 32) {
        forward<Real, Index, 32>(w, x, batch, bias, y, threads);
    } else {
        forward<Real, Index, 64>(w, x, batch, bias, y, threads);
    }
}

template <class Real, class Index>
void to_input_any(const Weight<Real, Index>& w, const Real* y, int64_t batch, Real* x, int threads) {
    if (batch <= 16) to_input<Real, Index, 16>(w, y, batch, x, threads);
    else if (batch <= 32) to_input<Real, Index, 32>(w, y, batch, x, threads);
    else to_input<Real, Index, 64>(w, y, batch, x, threads);
}

// Wide tiles: what a kept weight costs beside its products is the sum of a vector's lanes, once for each tile.
template <class Real, class Index>
void to_values_any(const Weight<Real, Index>& w, const Real* y, const Real* x, int64_t batch, Real* slopes,
                   int threads) {
    if (batch <= 16) to_values<Real, Index, 16>(w, y, x, batch, slopes, threads);
    else if (batch <= 32) to_values<Real, Index, 32>(w, y, x, batch, slopes, threads);
    else if (batch <= 64) to_values<Real, Index, 64>(w, y, x, batch, slopes, threads);
    else if (batch <= 128) to_values<Real, Index, 128>(w, y, x, batch, slopes, threads);
    else to_values<Real, Index, 256>(w, y, x, batch, slopes, threads);
}

// Calls `body` with the weight in its own types: values of `width` bytes, columns of `index` bytes.
template <class Body>
int typed(const void* values, int width, const void* columns, int index, const int64_t* starts, int64_t rows,
           int64_t cols, Body body) {
    auto given = [&](auto real) {
        using Real = decltype(real);
        const Real* v = static_cast<const Real*>(values);
        if (index == 2) body(Weight<Real, int16_t>{v, static_cast<const int16_t*>(columns), starts, rows, cols}, real);
        else body(Weight<Real, int32_t>{v, static_cast<const int32_t*>(columns), starts, rows, cols}, real);
    };
    try {
        if (width == 8) given(double{});
        else given(float{});
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {

// All matrices are contiguous: x [batch, cols], y [batch, rows]; values, bias and results have `width` bytes a number.
// Each returns 0, or 1 where there is no memory for its work.

int sparsity_linear(const void* values, int width, const void* columns, int index, const int64_t* starts, int64_t rows,
                     int64_t cols, const void* x, int64_t batch, const void* bias, void* y, int threads) {
    return typed(values, width, columns, index, starts, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        forward_any(w, static_cast<const Real*>(x), batch, static_cast<const Real*>(bias), static_cast<Real*>(y),
                    threads);
    });
}

int sparsity_linear_input(const void* values, int width, const void* columns, int index, const int64_t* starts,
                           int64_t rows, int64_t cols, const void* y, int64_t batch, void* x, int threads) {
    return typed(values, width, columns, index, starts, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        to_input_any(w, static_cast<const Real*>(y), batch, static_cast<Real*>(x), threads);
    });
}

// `values` are written: the slope of each.
int sparsity_linear_values(void* values, int width, const void* columns, int index, const int64_t* starts,
                            int64_t rows, int64_t cols, const void* y, const void* x, int64_t batch, int threads) {
    return typed(nullptr, width, columns, index, starts, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        to_values_any(w, static_cast<const Real*>(y), static_cast<const Real*>(x), batch, static_cast<Real*>(values),
                      threads);
    });
}
}
