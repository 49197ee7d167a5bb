/* Compiled Winograd convolutions for winograd.py: each transform is one pass over memory, and a convolution processes
   blocks of tiles, whose points stay in the cache of a core.

   Maps are (n, height, width, channels), points (36, tiles, channels), all contiguous; channels fill cache lines. The
   transforms are those of winograd_transforms.py: the same operations in the same order, and factors that are powers of
   two, so the same bits. */

#include <omp.h>

#define LANES 8   /* floats per vector: half a cache line */
#define LINE 16   /* floats per cache line, and columns of a product that is held in registers */
#define POINTS 36 /* per tile */
#define BLOCK 24  /* tiles whose points a core holds */
#define ROWS 6    /* of a product that is held in registers; divides BLOCK */
#define WEIGHT_ROWS 4
#define INLINE static inline __attribute__((always_inline))

const unsigned source_checksum = SOURCE_CHECKSUM; /* see setup.py */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef struct {
    long n, height, width, channels;
} shape;

static const float zeros[LANES];

INLINE lanes load(const float *from) { return *(const lanes *)from; }

INLINE void store(float *to, lanes values) { *(lanes *)to = values; }

INLINE long high(shape s) { return (s.height + 3) / 4; }

INLINE long wide(shape s) { return (s.width + 3) / 4; }

INLINE long tiles(shape s) { return s.n * high(s) * wide(s); }

INLINE long image_of(shape s, long tile) { return tile / (high(s) * wide(s)) * s.height * s.width * s.channels; }

INLINE long top_of(shape s, long tile) { return tile / wide(s) % high(s) * 4; }

INLINE long left_of(shape s, long tile) { return tile % wide(s) * 4; }

/* One-dimensional transforms of a tile; outputs are `step` apart, so that rows and columns use the same functions. */

INLINE void evaluate(const lanes *d, lanes *out, int step) {
    lanes even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    out[0] = even - d[2] + 4 * d[0];
    out[step] = even + odd;
    out[2 * step] = even - odd;
    even = d[4] - d[2];
    odd = d[3] - d[1];
    out[3 * step] = even + 2 * odd;
    out[4 * step] = even - 2 * odd;
    out[5 * step] = d[5] - d[3] - 4 * odd;
}

INLINE void interpolate(const lanes *m, lanes *out, int step) {
    lanes even = m[1] + m[2], odd = m[1] - m[2], far_even = m[3] + m[4], far_odd = m[3] - m[4];
    out[0] = even + far_even + m[0];
    out[step] = odd + 2 * far_odd;
    out[2 * step] = even + 4 * far_even;
    out[3 * step] = odd + 8 * far_odd + m[5];
}

INLINE void spread(const lanes *y, lanes *out, int step) {
    lanes even = y[0] + y[2], odd = y[1] + y[3];
    out[0] = y[0];
    out[step] = even + odd;
    out[2 * step] = even - odd;
    even = y[0] + 4 * y[2];
    odd = y[1] + 4 * y[3];
    out[3 * step] = even + 2 * odd;
    out[4 * step] = even - 2 * odd;
    out[5 * step] = y[3];
}

/* Transforms of one tile; points are `stride` apart. Whole cache lines are written, because half a line would be fetched
   again for the other half. */

/* Addresses of the `side` x `side` values of a tile; outside of the map the address of zeros, with `moves` = 0. */
INLINE void find(const float *maps, shape s, long tile, int border, int side, const float **at, long *moves) {
    const float *map = maps + image_of(s, tile);
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            long row = top_of(s, tile) - border + y, column = left_of(s, tile) - border + x;
            int inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
            at[side * y + x] = inside ? map + (row * s.width + column) * s.channels : zeros;
            moves[side * y + x] = inside;
        }
}

INLINE void store_points(float *to, long stride, lanes values[2][POINTS]) {
    for (int p = 0; p < POINTS; p++) {
        store(to + p * stride, values[0][p]);
        store(to + p * stride + LANES, values[1][p]);
    }
}

/* Points of a tile of 6 x 6 values, or the transposed transform of 4 x 4 values; `side` is a compile-time constant. */
INLINE void tile_to_points(const float *maps, shape s, long tile, int side, float *points, long stride) {
    const float *at[36];
    long moves[36];
    find(maps, s, tile, side == 6, side, at, moves);
    for (long c = 0; c < s.channels; c += LINE) {
        lanes values[2][POINTS];
        for (int half = 0; half < 2; half++) {
            lanes d[6], rows[36];
#pragma GCC unroll 6
            for (int y = 0; y < side; y++) {
#pragma GCC unroll 6
                for (int x = 0; x < side; x++) d[x] = load(at[side * y + x] + moves[side * y + x] * (c + half * LANES));
                side == 6 ? evaluate(d, rows + y, side) : spread(d, rows + y, side);
            }
#pragma GCC unroll 6
            for (int x = 0; x < 6; x++)
                side == 6 ? evaluate(rows + side * x, values[half] + x, 6) : spread(rows + side * x, values[half] + x, 6);
        }
        store_points(points + c, stride, values);
    }
}

/* Output values of one tile for a cache line of channels. */
INLINE void tile_from_points(const float *points, long stride, float *maps, shape s, long tile, long channel) {
    lanes values[2][16];
    for (int half = 0; half < 2; half++) {
        lanes m[6], rows[24];
#pragma GCC unroll 6
        for (int x = 0; x < 6; x++) {
#pragma GCC unroll 6
            for (int y = 0; y < 6; y++) m[y] = load(points + half * LANES + (6 * y + x) * stride);
            interpolate(m, rows + x, 6);
        }
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) interpolate(rows + 6 * y, values[half] + 4 * y, 1);
    }
    long top = top_of(s, tile), left = left_of(s, tile);
    for (int y = 0; y < 4 && top + y < s.height; y++)
        for (int x = 0; x < 4 && left + x < s.width; x++) {
            float *to = maps + image_of(s, tile) + ((top + y) * s.width + left + x) * s.channels + channel;
            store(to, values[0][4 * y + x]);
            store(to + LANES, values[1][4 * y + x]);
        }
}

/* Transforms without the products. */

void to_points(const float *maps, float *points, long n, long height, long width, long channels, int threads) {
    shape s = {n, height, width, channels};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles(s); tile++)
        tile_to_points(maps, s, tile, 6, points + tile * channels, tiles(s) * channels);
}

void gradient_points(const float *maps, float *points, long n, long height, long width, long channels, int threads) {
    shape s = {n, height, width, channels};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles(s); tile++)
        tile_to_points(maps, s, tile, 4, points + tile * channels, tiles(s) * channels);
}

void from_points(const float *points, float *maps, long n, long height, long width, long channels, int threads) {
    shape s = {n, height, width, channels};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles(s); tile++)
        for (long c = 0; c < channels; c += LINE)
            tile_from_points(points + tile * channels + c, tiles(s) * channels, maps, s, tile, c);
}

/* Matrix products held in registers: each row is two named vectors, which the compiler keeps in registers. */

#define FOUR(f) f(0) f(1) f(2) f(3)
#define SIX(f) FOUR(f) f(4) f(5)
#define BEGIN(r) lanes left##r = {0}, right##r = {0};
#define ADD(r)                                          \
    left##r += a[r * row + k * column] * b[0];          \
    right##r += a[r * row + k * column] * b[1];
#define SET(r)                           \
    store(out + r * stride, left##r);    \
    store(out + r * stride + LANES, right##r);
#define INCREASE(r)                                                            \
    store(out + r * stride, load(out + r * stride) + left##r);                 \
    store(out + r * stride + LANES, load(out + r * stride + LANES) + right##r);

/* (6, depth) times (depth, 16): rows of the first matrix are contiguous, the second matrix is contiguous. */
INLINE void six_rows(const float *a, long row, const float *lines, long depth, float *out, long stride) {
    const long column = 1;
    SIX(BEGIN)
    for (long k = 0; k < depth; k++) {
        lanes b[2] = {load(lines + LINE * k), load(lines + LINE * k + LANES)};
        SIX(ADD)
    }
    SIX(SET)
}

/* (depth, 4) transposed times (depth, 16), added to `out`; `column` and `step` are the row strides. */
INLINE void four_columns(const float *a, long column, const float *lines, long step, long depth, float *out,
                         long stride) {
    const long row = 1;
    FOUR(BEGIN)
    for (long k = 0; k < depth; k++) {
        lanes b[2] = {load(lines + step * k), load(lines + step * k + LANES)};
        FOUR(ADD)
    }
    FOUR(INCREASE)
}

/* Convolution of maps with kernels (outs / 16, 36, channels, 16); each thread processes one block of tiles at a time.
   `scratch` holds 36 x 24 x (channels + 16) floats per thread. */
void convolve(const float *maps, const float *kernels, float *out, float *scratch, long n, long height, long width,
              long channels, long outs, int threads) {
    shape s = {n, height, width, channels}, o = {n, height, width, outs};
#pragma omp parallel num_threads(threads)
    {
        float *points = scratch + omp_get_thread_num() * POINTS * BLOCK * (channels + LINE);
        float *results = points + POINTS * BLOCK * channels;
#pragma omp for schedule(static)
        for (long first = 0; first < tiles(s); first += BLOCK) {
            long count = tiles(s) - first < BLOCK ? tiles(s) - first : BLOCK;
            for (long t = 0; t < count; t++)
                tile_to_points(maps, s, first + t, 6, points + t * channels, BLOCK * channels);
            for (long c = 0; c < outs; c += LINE) {
                for (int p = 0; p < POINTS; p++)
                    for (long t = 0; t < count; t += ROWS)
                        six_rows(points + (p * BLOCK + t) * channels, channels, kernels + (c * POINTS + p * LINE) * channels,
                                 channels, results + (p * BLOCK + t) * LINE, LINE);
                for (long t = 0; t < count; t++)
                    tile_from_points(results + t * LINE, BLOCK * LINE, out, o, first + t, c);
            }
        }
    }
}

/* Products of the points of the gradient and of the maps, summed over tiles, added to `sums` (threads, 36, outs,
   channels). `scratch` holds 36 x 24 x (channels + outs) floats per thread. */
void weight_sums(const float *maps, const float *gradient, float *sums, float *scratch, long n, long height, long width,
                 long channels, long outs, int threads) {
    shape s = {n, height, width, channels}, o = {n, height, width, outs};
#pragma omp parallel num_threads(threads)
    {
        float *points = scratch + omp_get_thread_num() * POINTS * BLOCK * (channels + outs);
        float *gradients = points + POINTS * BLOCK * channels;
        float *sum = sums + omp_get_thread_num() * POINTS * outs * channels;
#pragma omp for schedule(static)
        for (long first = 0; first < tiles(s); first += BLOCK) {
            long count = tiles(s) - first < BLOCK ? tiles(s) - first : BLOCK;
            for (long t = 0; t < count; t++) {
                tile_to_points(maps, s, first + t, 6, points + t * channels, BLOCK * channels);
                tile_to_points(gradient, o, first + t, 4, gradients + t * outs, BLOCK * outs);
            }
            for (int p = 0; p < POINTS; p++)
                for (long c = 0; c < channels; c += LINE)
                    for (long r = 0; r < outs; r += WEIGHT_ROWS)
                        four_columns(gradients + p * BLOCK * outs + r, outs, points + p * BLOCK * channels + c, channels,
                                     count, sum + (p * outs + r) * channels + c, channels);
        }
    }
}
