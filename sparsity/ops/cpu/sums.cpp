// Sums in whole numbers, and what has to be known of an addend before: see sums.py.

#include <cmath>
#include <cstdint>
#include <cstring>

// Each operation rounds by itself, as in PyTorch: the sums are then the same, to the last bit.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

template <class Real>
void add(double* upper, double* lower, const Real* values, int64_t size, double scale, double parts) {
    for (int64_t i = 0; i < size; ++i) {
        const double addend = static_cast<double>(values[i]) * scale;
        const double whole = std::nearbyint(addend);
        upper[i] += whole;
        lower[i] += std::nearbyint((addend - whole) * parts);
    }
}

// The bits of magnitudes, as integers, have their order; what is not finite is beyond all others.
template <class Real, class Bits>
double largest(const Real* values, int64_t size) {
    constexpr Bits magnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
    Bits most = 0;
    for (int64_t i = 0; i < size; ++i) {
        Bits bits;
        std::memcpy(&bits, values + i, sizeof bits);
        bits &= magnitude;
        most = bits > most ? bits : most;
    }
    Real found;
    std::memcpy(&found, &most, sizeof found);
    return found;
}

template <class Real>
void count(const Real* values, const uint8_t* mask, int64_t size, int64_t* found) {
    int64_t kept = 0, strays = 0;
    for (int64_t i = 0; i < size; ++i) {
        kept += mask[i] != 0;
        strays += (values[i] != 0) & (mask[i] == 0);
    }
    found[0] = kept;
    found[1] = strays;
}

}  // namespace

extern "C" {

// upper += round(values * scale), lower += round((values * scale - that) * parts); `width` bytes to a value.
void sparsity_sums_add(double* upper, double* lower, const void* values, int width, int64_t size, double scale,
                       double parts) {
    if (width == 4) {
        add(upper, lower, static_cast<const float*>(values), size, scale, parts);
    } else {
        add(upper, lower, static_cast<const double*>(values), size, scale, parts);
    }
}

// The largest magnitude, how many values the mask keeps, and how many it does not that are not zero.
void sparsity_sums_look(const void* values, int width, int64_t size, const uint8_t* mask, int64_t masked,
                        double* most, int64_t* found) {
    if (width == 4) {
        const float* given = static_cast<const float*>(values);
        *most = largest<float, uint32_t>(given, size);
        count(given, mask, masked, found);
    } else {
        const double* given = static_cast<const double*>(values);
        *most = largest<double, uint64_t>(given, size);
        count(given, mask, masked, found);
    }
}

}  // extern "C"
