// The yardstick of benchmarks/engine.py: the same Euler-Maruyama chains as C++ loops, compiled for the machine that runs them.
//
// Blocks of LANES paths, time loop outside, lane loop innermost, polynomial Box-Muller: as ctrl/kernels, with every dimension and
// every number of components known to the compiler.
// Philox: counter-based, the library's own streams, so that paths agree with the library's to rounding. Wide: the same words on
// 64-bit lanes, which vector units of 256 bits multiply without packing. Lanes: xoshiro128++, one state per lane, the fastest
// generator known here; its numbers depend on the blocking, so it is a yardstick only.

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int LANES = 256;

template <class To, class From> static inline To bits(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From), "same width");
    std::memcpy(&y, &x, sizeof y);
    return y;
}

struct Philox {
    uint32_t k0, k1;
    uint64_t first;
    void start(uint64_t seed, uint64_t path) { k0 = uint32_t(seed), k1 = uint32_t(seed >> 32), first = path; }
    void words(uint32_t group, uint32_t lane, uint32_t w[4][LANES]) {
        const uint32_t low = uint32_t(first), high = uint32_t(first >> 32);
        const uint32_t key0 = k0, key1 = k1;
        for (int l = 0; l < LANES; ++l) {
            uint32_t x0 = low + l, x1 = high, x2 = group, x3 = lane, a = key0, b = key1;
#pragma GCC unroll 10
            for (int r = 0; r < 10; ++r) {
                uint64_t p = uint64_t(x0) * 0xD2511F53u, q = uint64_t(x2) * 0xCD9E8D57u;
                x0 = uint32_t(q >> 32) ^ x1 ^ a, x1 = uint32_t(q), x2 = uint32_t(p >> 32) ^ x3 ^ b, x3 = uint32_t(p);
                a += 0x9E3779B9u, b += 0xBB67AE85u;
            }
            w[0][l] = x0, w[1][l] = x1, w[2][l] = x2, w[3][l] = x3;
        }
    }
};

struct Wide {
    uint64_t k0, k1, first;
    void start(uint64_t seed, uint64_t path) { k0 = uint32_t(seed), k1 = seed >> 32, first = path; }
    void words(uint32_t group, uint32_t lane, uint32_t w[4][LANES]) {
        const uint64_t low = 0xFFFFFFFFu, key0 = k0, key1 = k1, begin = first;
        for (int l = 0; l < LANES; ++l) {
            uint64_t x0 = begin + l, x1 = x0 >> 32, x2 = group, x3 = lane, a = key0, b = key1;
#pragma GCC unroll 10
            for (int r = 0; r < 10; ++r) {
                uint64_t p = (x0 & low) * 0xD2511F53u, q = (x2 & low) * 0xCD9E8D57u;
                x0 = (q >> 32) ^ (x1 ^ a), x1 = q, x2 = (p >> 32) ^ (x3 ^ b), x3 = p;
                a += 0x9E3779B9u, b += 0xBB67AE85u;
            }
            w[0][l] = uint32_t(x0), w[1][l] = uint32_t(x1), w[2][l] = uint32_t(x2), w[3][l] = uint32_t(x3);
        }
    }
};

struct Lanes {
    uint32_t s[4][LANES];
    void start(uint64_t seed, uint64_t path) {
        for (int l = 0; l < LANES; ++l) {
            uint64_t z = seed + 0x9E3779B97F4A7C15ull * (path + l + 1);
            for (int j = 0; j < 4; ++j) {
                z += 0x9E3779B97F4A7C15ull;
                uint64_t y = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
                y = (y ^ (y >> 27)) * 0x94D049BB133111EBull;
                s[j][l] = uint32_t((y ^ (y >> 31)) >> 16);
            }
        }
    }
    void words(uint32_t, uint32_t, uint32_t w[4][LANES]) {
        for (int j = 0; j < 4; ++j)
            for (int l = 0; l < LANES; ++l) {
                uint32_t a = s[0][l] + s[3][l], t = s[1][l] << 9;
                w[j][l] = ((a << 7) | (a >> 25)) + s[0][l];
                s[2][l] ^= s[0][l], s[3][l] ^= s[1][l], s[1][l] ^= s[2][l], s[0][l] ^= s[3][l], s[2][l] ^= t;
                s[3][l] = (s[3][l] << 11) | (s[3][l] >> 21);
            }
    }
};

static inline void box_muller(const uint32_t *wa, const uint32_t *wb, float *za, float *zb) {
    for (int l = 0; l < LANES; ++l) {
        int32_t w = int32_t(wa[l]), flip = w >> 31;
        float t = (float(w ^ flip) + 0.5f) * 0x1p-32f, u = flip == 0 ? t : 1.0f - t;
        int32_t b = bits<int32_t>(u), e = (b - 0x3F3504F3) >> 23;
        float f = e < 0 ? bits<float>(b - (e << 23)) - 1.0f : -t, k = float(e), ff = f * f;
        float y = 7.0376836292e-2f;
        y = y * f - 1.1514610310e-1f, y = y * f + 1.1676998740e-1f, y = y * f - 1.2420140846e-1f, y = y * f + 1.4249322787e-1f;
        y = y * f - 1.6668057665e-1f, y = y * f + 2.0000714765e-1f, y = y * f - 2.4999993993e-1f, y = y * f + 3.3333331174e-1f;
        float radius = std::sqrt(-2.0f * (k * -2.12194440e-4f + y * f * ff - 0.5f * ff + f + k * 0.693359375f));
        uint32_t v = wb[l], q = (v + 0x20000000u) >> 30;
        float x = (float(int32_t(v - (q << 30))) + 0.5f) * float(6.283185307179586 * 0x1p-32), z = x * x;
        float s = radius * (((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x);
        float c = radius * (((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f);
        bool odd = q & 1;
        za[l] = bits<float>(bits<uint32_t>(odd ? s : c) ^ (((q + 1) & 2) << 30));
        zb[l] = bits<float>(bits<uint32_t>(odd ? c : s) ^ ((q & 2) << 30));
    }
}

static inline void box_muller(const uint32_t *wa, const uint32_t *wb, double *za, double *zb) {
    for (int l = 0; l < LANES; ++l) {
        double u = (double(wa[l]) + 0.5) * 0x1p-32;
        uint64_t b = bits<uint64_t>(u), e = (b - 0x3FE6A09E667F3BCDull + (64ull << 52)) >> 52;
        double k = bits<double>(e | 0x4330000000000000ull) - (0x1p52 + 64.0), f = bits<double>(b - (e << 52) + (64ull << 52)) - 1.0;
        double s = f / (2.0 + f), z = s * s;
        double r = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 + z * (2.222219843214978396e-01
                 + z * (1.818357216161805012e-01 + z * (1.531383769920937332e-01 + z * 1.479819860510658591e-01))))));
        double h = 0.5 * f * f;
        double radius = std::sqrt(-2.0 * (k * 6.93147180369123816490e-01 - ((h - (s * (h + r) + k * 1.90821492927058770002e-10)) - f)));
        uint32_t v = wb[l], q = (v + 0x20000000u) >> 30;
        double x = (double(int32_t(v - (q << 30))) + 0.5) * (6.283185307179586 * 0x1p-32), y = x * x;
        double sn = radius * (x + x * y * (-1.66666666666666324348e-01 + y * (8.33333333332248946124e-03 + y * (-1.98412698298579493134e-04
                  + y * (2.75573137070700676789e-06 + y * (-2.50507602534068634195e-08 + y * 1.58969099521155010221e-10))))));
        double cs = radius * (1.0 - (0.5 * y - y * y * (4.16666666666666019037e-02 + y * (-1.38888888888741095749e-03 + y * (2.48015872894767294178e-05
                  + y * (-2.75573143513906633035e-07 + y * (2.08757232129817482790e-09 + y * -1.13596475577881948265e-11)))))));
        bool odd = q & 1;
        za[l] = bits<double>(bits<uint64_t>(odd ? sn : cs) ^ (uint64_t((q + 1) & 2) << 62));
        zb[l] = bits<double>(bits<uint64_t>(odd ? cs : sn) ^ (uint64_t(q & 2) << 62));
    }
}

// W1: x' = A x + c + s xi, A diagonal (one number a step and coordinate) or dense; x (n, d) holds the start and receives the end.
template <class T, class Generator, int D, bool DENSE>
static void affine(int64_t n, int steps, uint64_t seed, const T *A, const T *c, const T *s, T *x) {
    alignas(64) static thread_local T state[D][LANES], next[D][LANES], z[4][D][LANES];
    alignas(64) static thread_local uint32_t w[4][LANES];
    for (int64_t begin = 0; begin < n; begin += LANES) {
        Generator g;
        g.start(seed, uint64_t(begin));
        for (int a = 0; a < D; ++a)
            for (int l = 0; l < LANES; ++l) state[a][l] = x[(begin + l) * D + a];
        for (int i = 0; i < steps; ++i) {
            if (i % 4 == 0)
                for (int a = 0; a < D; ++a) {
                    g.words(uint32_t(i / 4), uint32_t(a), w);
                    box_muller(w[0], w[1], z[0][a], z[1][a]);
                    box_muller(w[2], w[3], z[2][a], z[3][a]);
                }
            const T si = s[i];
            if (!DENSE) {
                for (int a = 0; a < D; ++a) {
                    const T m = A[i * D + a], k = c[i * D + a];
                    T *r = state[a];
                    const T *xi = z[i % 4][a];
                    for (int l = 0; l < LANES; ++l) r[l] = m * r[l] + (k + si * xi[l]);
                }
            } else {
                for (int a = 0; a < D; ++a) {
                    const T k = c[i * D + a], *row = A + (i * D + a) * D, *xi = z[i % 4][a];
                    for (int l = 0; l < LANES; ++l) {
                        T sum = k + si * xi[l];
                        for (int b = 0; b < D; ++b) sum += row[b] * state[b][l];
                        next[a][l] = sum;
                    }
                }
                std::memcpy(state, next, sizeof state);
            }
        }
        for (int a = 0; a < D; ++a)
            for (int l = 0; l < LANES; ++l) x[(begin + l) * D + a] = state[a][l];
    }
}

static inline float exp_below(float t) {
    t = t > -87.0f ? t : -87.0f;
    float shifted = t * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f, r = t - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return bits<float>(bits<int32_t>(p) + (bits<int32_t>(shifted) << 23));
}

static inline double exp_below(double t) {
    t = t > -708.0 ? t : -708.0;
    double shifted = t * 1.44269504088896340736 + 6755399441055744.0, n = shifted - 6755399441055744.0;
    double r = t - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    double p = 1.0 / 479001600;
    p = p * r + 1.0 / 39916800, p = p * r + 1.0 / 3628800, p = p * r + 1.0 / 362880, p = p * r + 1.0 / 40320, p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720, p = p * r + 1.0 / 120, p = p * r + 1.0 / 24, p = p * r + 1.0 / 6, p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    return bits<double>(bits<int64_t>(p) + (bits<int64_t>(shifted) << 52));
}

// W2: x' = A x + s xi + drive score(x), a mixture of K components in 2-D: mean (2), precision (p00, p01, p11), constant per step and component.
// One pass over the lanes a component, so that the loops become vector instructions.
template <class T, class Generator, int K>
static void mixture(int64_t n, int steps, uint64_t seed, const T *A, const T *drive, const T *s, const T *component, T *x) {
    alignas(64) static thread_local T x0[LANES], x1[LANES], z[4][2][LANES], level[K][LANES], top[LANES], total[LANES], s0[LANES], s1[LANES];
    alignas(64) static thread_local uint32_t w[4][LANES];
    for (int64_t begin = 0; begin < n; begin += LANES) {
        Generator g;
        g.start(seed, uint64_t(begin));
        for (int l = 0; l < LANES; ++l) x0[l] = x[(begin + l) * 2], x1[l] = x[(begin + l) * 2 + 1];
        for (int i = 0; i < steps; ++i) {
            if (i % 4 == 0)
                for (int a = 0; a < 2; ++a) {
                    g.words(uint32_t(i / 4), uint32_t(a), w);
                    box_muller(w[0], w[1], z[0][a], z[1][a]);
                    box_muller(w[2], w[3], z[2][a], z[3][a]);
                }
            const T m = A[i], h = drive[i], si = s[i], *q = component + i * K * 6;
            const T *xi0 = z[i % 4][0], *xi1 = z[i % 4][1];
            for (int l = 0; l < LANES; ++l) top[l] = T(-1e30), total[l] = 0, s0[l] = 0, s1[l] = 0;
            for (int k = 0; k < K; ++k) {
                const T m0 = q[6 * k], m1 = q[6 * k + 1], p00 = q[6 * k + 2], p01 = q[6 * k + 3], p11 = q[6 * k + 4], constant = q[6 * k + 5];
                for (int l = 0; l < LANES; ++l) {
                    T g0 = x0[l] - m0, g1 = x1[l] - m1, y = constant - T(0.5) * (g0 * (p00 * g0 + p01 * g1) + g1 * (p01 * g0 + p11 * g1));
                    level[k][l] = y, top[l] = y > top[l] ? y : top[l];
                }
            }
            for (int k = 0; k < K; ++k) {
                const T m0 = q[6 * k], m1 = q[6 * k + 1], p00 = q[6 * k + 2], p01 = q[6 * k + 3], p11 = q[6 * k + 4];
                for (int l = 0; l < LANES; ++l) {
                    T e = exp_below(level[k][l] - top[l]), g0 = x0[l] - m0, g1 = x1[l] - m1;
                    total[l] += e, s0[l] += e * (p00 * g0 + p01 * g1), s1[l] += e * (p01 * g0 + p11 * g1);
                }
            }
            for (int l = 0; l < LANES; ++l) {
                T scale = h / total[l];
                x0[l] = m * x0[l] + si * xi0[l] - scale * s0[l], x1[l] = m * x1[l] + si * xi1[l] - scale * s1[l];
            }
        }
        for (int l = 0; l < LANES; ++l) x[(begin + l) * 2] = x0[l], x[(begin + l) * 2 + 1] = x1[l];
    }
}

// W3: sampled actions of an affine policy in 2-D, and the two sums of the score-function gradient, in `bins` time bins:
// x' = A x + c + s xi + E z,  u = U x + u0 + F z,  S += gain xi (x, 1),  P += pull u (x, 1),  spent += price |u|^2 / 2.
// E and F diagonal; per step A (4), c (2), U (4), u0 (2), then s, E, F, gain, pull, price: 18 numbers, and the bin. S, P (n, bins, 6).
template <class T, class Generator, int BINS>
static void gradient(int64_t n, int steps, uint64_t seed, const T *step, const int32_t *bin, T *x, T *spent, T *S, T *P) {
    alignas(64) static thread_local T x0[LANES], x1[LANES], z[2][4][2][LANES], cost[LANES], sums[2][BINS * 6][LANES];
    alignas(64) static thread_local uint32_t w[4][LANES];
    for (int64_t begin = 0; begin < n; begin += LANES) {
        Generator g;
        g.start(seed, uint64_t(begin));
        std::memset(sums, 0, sizeof sums);
        for (int l = 0; l < LANES; ++l) x0[l] = x[(begin + l) * 2], x1[l] = x[(begin + l) * 2 + 1], cost[l] = 0;
        for (int i = 0; i < steps; ++i) {
            if (i % 4 == 0)
                for (int stream = 0; stream < 2; ++stream)
                    for (int a = 0; a < 2; ++a) {
                        g.words(uint32_t(i / 4), uint32_t(a) | uint32_t(2 * stream) << 28, w);
                        box_muller(w[0], w[1], z[stream][0][a], z[stream][1][a]);
                        box_muller(w[2], w[3], z[stream][2][a], z[stream][3][a]);
                    }
            const T *p = step + i * 18, a00 = p[0], a01 = p[1], a10 = p[2], a11 = p[3], c0 = p[4], c1 = p[5], u00 = p[6], u01 = p[7], u10 = p[8],
                    u11 = p[9], k0 = p[10], k1 = p[11], s = p[12], E = p[13], F = p[14], gain = p[15], pull = p[16], price = p[17];
            const T *xi0 = z[0][i % 4][0], *xi1 = z[0][i % 4][1], *z0 = z[1][i % 4][0], *z1 = z[1][i % 4][1];
            T(*s_)[LANES] = sums[0] + bin[i] * 6, (*p_)[LANES] = sums[1] + bin[i] * 6;
            for (int l = 0; l < LANES; ++l) {
                T a = x0[l], b = x1[l], n0 = xi0[l], n1 = xi1[l], e0 = z0[l], e1 = z1[l];
                T u0 = u00 * a + u01 * b + k0 + F * e0, u1 = u10 * a + u11 * b + k1 + F * e1;
                T v0 = gain * n0, v1 = gain * n1, q0 = pull * u0, q1 = pull * u1;
                cost[l] += price * T(0.5) * (u0 * u0 + u1 * u1);
                s_[0][l] += v0 * a, s_[1][l] += v0 * b, s_[2][l] += v1 * a, s_[3][l] += v1 * b, s_[4][l] += v0, s_[5][l] += v1;
                p_[0][l] += q0 * a, p_[1][l] += q0 * b, p_[2][l] += q1 * a, p_[3][l] += q1 * b, p_[4][l] += q0, p_[5][l] += q1;
                x0[l] = a00 * a + a01 * b + c0 + s * n0 + E * e0, x1[l] = a10 * a + a11 * b + c1 + s * n1 + E * e1;
            }
        }
        for (int l = 0; l < LANES; ++l) {
            x[(begin + l) * 2] = x0[l], x[(begin + l) * 2 + 1] = x1[l], spent[begin + l] = cost[l];
            for (int k = 0; k < BINS * 6; ++k) S[(begin + l) * BINS * 6 + k] = sums[0][k][l], P[(begin + l) * BINS * 6 + k] = sums[1][k][l];
        }
    }
}

#define EACH(GENERATOR, NAME, T, BITS) \
    extern "C" void NAME##_affine_1_##BITS(int64_t n, int steps, uint64_t seed, const T *A, const T *c, const T *s, T *x) { \
        affine<T, GENERATOR, 1, false>(n, steps, seed, A, c, s, x); } \
    extern "C" void NAME##_affine_2_##BITS(int64_t n, int steps, uint64_t seed, const T *A, const T *c, const T *s, T *x) { \
        affine<T, GENERATOR, 2, false>(n, steps, seed, A, c, s, x); } \
    extern "C" void NAME##_affine_8_##BITS(int64_t n, int steps, uint64_t seed, const T *A, const T *c, const T *s, T *x) { \
        affine<T, GENERATOR, 8, false>(n, steps, seed, A, c, s, x); } \
    extern "C" void NAME##_dense_8_##BITS(int64_t n, int steps, uint64_t seed, const T *A, const T *c, const T *s, T *x) { \
        affine<T, GENERATOR, 8, true>(n, steps, seed, A, c, s, x); } \
    extern "C" void NAME##_mixture_##BITS(int64_t n, int steps, uint64_t seed, const T *A, const T *drive, const T *s, const T *component, T *x) { \
        mixture<T, GENERATOR, 8>(n, steps, seed, A, drive, s, component, x); } \
    extern "C" void NAME##_gradient_##BITS(int64_t n, int steps, uint64_t seed, const T *step, const int32_t *bin, T *x, T *spent, T *S, T *P) { \
        gradient<T, GENERATOR, 16>(n, steps, seed, step, bin, x, spent, S, P); }
EACH(Philox, philox, float, 32)
EACH(Philox, philox, double, 64)
EACH(Wide, wide, float, 32)
EACH(Wide, wide, double, 64)
EACH(Lanes, lanes, float, 32)
EACH(Lanes, lanes, double, 64)
