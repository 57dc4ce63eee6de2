// Histograms of 16 bits of floats, for an exact selection by rank: see select.py.

#include <cstdint>
#include <new>
#include <vector>

namespace {

constexpr int kDigit = 16;
constexpr int64_t kBins = int64_t{1} << kDigit;
constexpr int64_t kBlock = 64;       // elements looked at together for the prefix, which few have
constexpr int64_t kMost = 1 << 30;   // additions until the 32-bit counts of a thread are carried

// The bits as integers that have the floats' order.
template <class Key>
inline Key ordered(Key bits) {
    constexpr int sign = 8 * sizeof(Key) - 1;
    constexpr Key rest = static_cast<Key>(~(Key{1} << sign));
    return static_cast<Key>(bits ^ static_cast<Key>((bits >> sign) & rest));
}

template <class Key>
void count_first(const Key* bits, int64_t size, int shift, uint32_t* counts) {
    for (int64_t i = 0; i < size; ++i) {
        ++counts[static_cast<int64_t>(ordered(bits[i]) >> shift) + kBins / 2];
    }
}

template <class Key>
void count_within(const Key* bits, int64_t size, int shift, Key prefix, uint32_t* counts) {
    for (int64_t begin = 0; begin < size; begin += kBlock) {
        const int64_t length = size - begin < kBlock ? size - begin : kBlock;
        int found = 0;
        for (int64_t i = begin; i < begin + length; ++i) {
            found += (ordered(bits[i]) >> (shift + kDigit)) == prefix;
        }
        if (found == 0) continue;
        for (int64_t i = begin; i < begin + length; ++i) {
            const Key key = ordered(bits[i]);
            if ((key >> (shift + kDigit)) == prefix) ++counts[(key >> shift) & (kBins - 1)];
        }
    }
}

template <class Key>
void histogram(const void* data, int64_t size, int shift, bool first, int64_t prefix, int64_t* out, int threads) {
    const Key* bits = static_cast<const Key*>(data);
    std::vector<uint32_t> all(kBins * threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; ++part) {
        uint32_t* counts = all.data() + kBins * part;
        const int64_t from = size * part / threads, to = size * (part + 1) / threads;
        for (int64_t begin = from; begin < to; begin += kMost) {
            const int64_t length = to - begin < kMost ? to - begin : kMost;
            if (first) {
                count_first(bits + begin, length, shift, counts);
            } else {
                count_within(bits + begin, length, shift, static_cast<Key>(prefix), counts);
            }
#pragma omp critical
            for (int64_t bin = 0; bin < kBins; ++bin) {
                out[bin] += counts[bin];
                counts[bin] = 0;
            }
        }
    }
}

}  // namespace

extern "C" {

// Adds to `out`, int64 [65536], how many of `size` floats of `width` bytes have each value of the 16 bits above
// `shift`: of all, or of those whose bits above them are `prefix`. Returns 1 where there is no memory for it.
int sparsity_histogram(const void* data, int64_t size, int width, int shift, int first, int64_t prefix, int64_t* out,
                       int threads) {
    try {
        if (width == 2) histogram<int16_t>(data, size, shift, first, prefix, out, threads);
        if (width == 4) histogram<int32_t>(data, size, shift, first, prefix, out, threads);
        if (width == 8) histogram<int64_t>(data, size, shift, first, prefix, out, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
