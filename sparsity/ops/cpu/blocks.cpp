// Products with a weight of square blocks: y = x W^T, x' = y W, and the slopes of the kept blocks. See blocks.py.

#include <cstring>

#include "tiles.h"

namespace {

constexpr int kChunk = 4;  // rows of a block, or columns, that are worked on together: their sums stay in registers

// A weight of [rows, width], cut into blocks of [side, side], each row by row; those of block row r are at
// starts[r] .. starts[r + 1]. What lies beyond the weight's own rows and columns is not looked at.
template <class Real>
struct Blocks {
    Real* values;
    const int32_t* columns;
    const int64_t* starts;
    int64_t side, rows, width;

    int64_t block_rows() const { return (rows + side - 1) / side; }
    int64_t padded_rows() const { return block_rows() * side; }
    int64_t padded_width() const { return (width + side - 1) / side * side; }
    int64_t count_rows(int64_t row) const { return std::min(side, rows - row * side); }
    int64_t count_columns(int64_t column) const { return std::min(side, width - column * side); }
};

template <class Real, int T>
void forward(const Blocks<Real>& w, const Real* x, int64_t batch, const Real* bias, Real* y, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, rows = w.padded_rows(), width = w.padded_width();
    const Buffer<Real> in = packed_tiles<Real, T>(x, batch, w.width, width, threads);
    Buffer<Real> out = uninitialised<Real>(tiles * rows * T);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t block_row = 0; block_row < w.block_rows(); ++block_row) {
            for (int64_t first = 0; first < w.side; first += kChunk) {
                Lane sums[kChunk][count] = {};
                for (int64_t p = w.starts[block_row]; p < w.starts[block_row + 1]; ++p) {
                    const Real* block = w.values + (p * w.side + first) * w.side;
                    const Real* from = in.get() + (tile * width + w.columns[p] * w.side) * T;
                    for (int64_t k = 0; k < w.count_columns(w.columns[p]); ++k) {
                        Lane column[count];
                        for (int i = 0; i < count; ++i) column[i] = load(from + k * T + i * lanes);
                        for (int r = 0; r < kChunk; ++r) {
                            for (int i = 0; i < count; ++i) sums[r][i] += block[r * w.side + k] * column[i];
                        }
                    }
                }
                Real* to = out.get() + (tile * rows + block_row * w.side + first) * T;
                for (int r = 0; r < kChunk; ++r) {
                    for (int i = 0; i < count; ++i) store(to + r * T + i * lanes, sums[r][i]);
                }
            }
        }
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        unpack<Real, T>(out.get() + tile * rows * T, batch, w.rows, tile, bias, y);
    }
}

// With fewer tiles than threads, threads share a tile's block rows, each with sums of its own.
template <class Real, int T>
void to_input(const Blocks<Real>& w, const Real* y, int64_t batch, Real* x, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, rows = w.padded_rows(), size = w.padded_width() * T;
    const int64_t parts = shares(threads / tiles, w.block_rows(), size * sizeof(Real));
    const Buffer<Real> in = packed_tiles<Real, T>(y, batch, w.rows, rows, threads);
    Buffer<Real> out = uninitialised<Real>(tiles * parts * size);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t part = 0; part < parts; ++part) {
            Real* to = out.get() + (tile * parts + part) * size;
            std::memset(to, 0, size * sizeof(Real));
            const int64_t from = w.block_rows() * part / parts, end = w.block_rows() * (part + 1) / parts;
            for (int64_t block_row = from; block_row < end; ++block_row) {
                const Real* slopes = in.get() + (tile * rows + block_row * w.side) * T;
                for (int64_t p = w.starts[block_row]; p < w.starts[block_row + 1]; ++p) {
                    for (int64_t first = 0; first < w.side; first += kChunk) {
                        const Real* block = w.values + p * w.side * w.side + first;
                        Real* place = to + (w.columns[p] * w.side + first) * T;
                        Lane sums[kChunk][count];
                        for (int c = 0; c < kChunk; ++c) {
                            for (int i = 0; i < count; ++i) sums[c][i] = load(place + c * T + i * lanes);
                        }
                        for (int64_t r = 0; r < w.count_rows(block_row); ++r) {
                            Lane row[count];
                            for (int i = 0; i < count; ++i) row[i] = load(slopes + r * T + i * lanes);
                            for (int c = 0; c < kChunk; ++c) {
                                for (int i = 0; i < count; ++i) sums[c][i] += block[r * w.side + c] * row[i];
                            }
                        }
                        for (int c = 0; c < kChunk; ++c) {
                            for (int i = 0; i < count; ++i) store(place + c * T + i * lanes, sums[c][i]);
                        }
                    }
                }
            }
        }
    }
    unpack_sums<Real, T>(out.get(), parts, size, batch, w.width, x, threads);
}

// The slopes of a block's places beyond the weight are zero.
template <class Real, int T>
void to_values(const Blocks<Real>& w, const Real* y, const Real* x, int64_t batch, int threads) {
    using Lane = typename Lanes<Real>::type;
    constexpr int lanes = Lanes<Real>::count, count = T / lanes;
    const int64_t tiles = (batch + T - 1) / T, rows = w.padded_rows(), width = w.padded_width();
    const Buffer<Real> out = packed_tiles<Real, T>(y, batch, w.rows, rows, threads);
    const Buffer<Real> in = packed_tiles<Real, T>(x, batch, w.width, width, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t block_row = 0; block_row < w.block_rows(); ++block_row) {
        for (int64_t p = w.starts[block_row]; p < w.starts[block_row + 1]; ++p) {
            const int64_t columns = w.count_columns(w.columns[p]);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const Real* from_y = out.get() + (tile * rows + block_row * w.side) * T;
                const Real* from_x = in.get() + (tile * width + w.columns[p] * w.side) * T;
                for (int64_t r = 0; r < w.side; r += kChunk) {
                    for (int64_t c = 0; c < w.side; c += kChunk) {
                        Lane sums[kChunk][kChunk] = {};
                        for (int i = 0; i < count; ++i) {
                            Lane column[kChunk];
                            for (int b = 0; b < kChunk; ++b) column[b] = load(from_x + (c + b) * T + i * lanes);
                            for (int a = 0; a < kChunk; ++a) {
                                const Lane row = load(from_y + (r + a) * T + i * lanes);
                                for (int b = 0; b < kChunk; ++b) sums[a][b] += row * column[b];
                            }
                        }
                        for (int a = 0; a < kChunk; ++a) {
                            Real* place = w.values + (p * w.side + r + a) * w.side + c;
                            for (int b = 0; b < kChunk; ++b) {
                                const bool inside = r + a < w.count_rows(block_row) && c + b < columns;
                                place[b] = inside ? (tile ? place[b] : Real{0}) + sum_of<Real>(sums[a][b]) : Real{0};
                            }
                        }
                    }
                }
            }
        }
    }
}

template <class Body>
int typed(void* values, int width, const int32_t* columns, const int64_t* starts, int64_t side, int64_t rows,
           int64_t cols, Body body) {
    try {
        if (width == 8) body(Blocks<double>{static_cast<double*>(values), columns, starts, side, rows, cols}, double{});
        else body(Blocks<float>{static_cast<float*>(values), columns, starts, side, rows, cols}, float{});
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {

// All matrices are contiguous: x [batch, cols], y [batch, rows]; values, bias and results have `width` bytes a number.
// Each returns 0, or 1 where there is no memory for its work.

int sparsity_blocks(void* values, int width, const int32_t* columns, const int64_t* starts, int64_t side, int64_t rows,
                     int64_t cols, const void* x, int64_t batch, const void* bias, void* y, int threads) {
    return typed(values, width, columns, starts, side, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        const Real *from = static_cast<const Real*>(x), *added = static_cast<const Real*>(bias);
        if (batch <= 16) forward<Real, 16>(w, from, batch, added, static_cast<Real*>(y), threads);
        else if (batch <= 32) forward<Real, 32>(w, from, batch, added, static_cast<Real*>(y), threads);
        else forward<Real, 64>(w, from, batch, added, static_cast<Real*>(y), threads);
    });
}

int sparsity_blocks_input(void* values, int width, const int32_t* columns, const int64_t* starts, int64_t side,
                           int64_t rows, int64_t cols, const void* y, int64_t batch, void* x, int threads) {
    return typed(values, width, columns, starts, side, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        const Real* from = static_cast<const Real*>(y);
        if (batch <= 16) to_input<Real, 16>(w, from, batch, static_cast<Real*>(x), threads);
        else if (batch <= 32) to_input<Real, 32>(w, from, batch, static_cast<Real*>(x), threads);
        else to_input<Real, 64>(w, from, batch, static_cast<Real*>(x), threads);
    });
}

// `values` are written: the slopes.
int sparsity_blocks_values(void* values, int width, const int32_t* columns, const int64_t* starts, int64_t side,
                            int64_t rows, int64_t cols, const void* y, const void* x, int64_t batch, int threads) {
    return typed(values, width, columns, starts, side, rows, cols, [&](auto w, auto real) {
        using Real = decltype(real);
        const Real *of_y = static_cast<const Real*>(y), *of_x = static_cast<const Real*>(x);
        if (batch <= 32) to_values<Real, 32>(w, of_y, of_x, batch, threads);
        else if (batch <= 64) to_values<Real, 64>(w, of_y, of_x, batch, threads);
        else to_values<Real, 128>(w, of_y, of_x, batch, threads);
    });
}
}
