/* Crops of bytes resized with antialiasing, as `resized_crop` of augment.py defines them: the same weights, without the
   products with those that are 0. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Keys' cubic with a = -0.5, or a triangle, at a distance of at least 0. */
INLINE float filter(float distance, int cubic) {
    if (!cubic) return distance < 1 ? 1 - distance : 0;
    if (distance < 1) return (1.5f * distance - 2.5f) * distance * distance + 1;
    return distance < 2 ? ((2.5f - 0.5f * distance) * distance - 4) * distance + 2 : 0;
}

/* Of each of `size` results: the first of the pixels it is made of, and the weights of so many as are returned. */
INLINE long weigh(long length, long size, int cubic, long *first, float *weights) {
    float scale = (float)length / size, narrow = scale > 1 ? 1 / scale : 1, reach = (cubic ? 2 : 1) / narrow;
    long taps = (long)ceilf(2 * reach);
    if (taps > length) taps = length;
    for (long i = 0; i < size; i++) {
        float start = (i + 0.5f) * scale - reach + 0.5f, centre = (i + 0.5f) * (scale * narrow), sum = 0;
        first[i] = start > 0 ? (long)start : 0; /* the first whose middle is within reach */
        if (first[i] > length - taps) first[i] = length - taps;
        for (long k = 0; k < taps; k++) {
            weights[i * taps + k] = filter(fabsf((first[i] + k + 0.5f) * narrow - centre), cubic);
            sum += weights[i * taps + k];
        }
        for (long k = 0; k < taps; k++) weights[i * taps + k] /= sum;
    }
    return taps;
}

/* (size, used) rows of results, from bytes that are `stride` apart from row to row. */
INLINE void down(const uint8_t *bytes, long stride, long used, long size, const long *first, const float *weights,
                 long taps, float *rows) {
    for (long i = 0; i < size; i++) {
        float *to = rows + i * used, once = weights[i * taps] / 255;
        for (long x = 0; x < used; x++) to[x] = once * bytes[first[i] * stride + x];
        for (long k = 1; k < taps; k++) {
            const uint8_t *from = bytes + (first[i] + k) * stride;
            float weight = weights[i * taps + k] / 255;
            for (long x = 0; x < used; x++) to[x] += weight * from[x];
        }
    }
}

/* (size, size) results in [0, 1] from one of the channels of rows that have `together` numbers a pixel. */
INLINE void across(const float *rows, long used, long together, long size, const long *first, const float *weights,
                   long taps, float *out) {
    for (long y = 0; y < size; y++)
        for (long i = 0; i < size; i++) {
            const float *from = rows + y * used + first[i] * together;
            float sum = weights[i * taps] * from[0];
            if (taps == 2) /* enlarged, as most crops are: no loop */
                sum += weights[i * taps + 1] * from[together];
            else
                for (long k = 1; k < taps; k++) sum += weights[i * taps + k] * from[k * together];
            out[y * size + i] = sum < 0 ? 0 : sum > 1 ? 1 : sum;
        }
}

/* Images are (n, planes, height, width, together) bytes: `together` is 1 where each channel is a plane, the number of
   channels where those of a pixel lie together. Boxes are (n, 4): top, left, height, width. Results are
   (n, planes * together, size, size). `scratch` has size x (width x together + height + width) numbers a thread. */
void resized_crops(const uint8_t *images, const int64_t *boxes, float *results, float *scratch, long n, long planes,
                   long height, long width, long together, long size, int cubic, int threads) {
    long stride = width * together;
#pragma omp parallel num_threads(threads)
    {
        float *rows = scratch + omp_get_thread_num() * size * (stride + height + width);
        float *vertical = rows + size * stride, *horizontal = vertical + size * height;
        long top[size], left[size];
#pragma omp for schedule(static)
        for (long image = 0; image < n; image++) {
            const int64_t *box = boxes + 4 * image;
            long vertical_taps = weigh(box[2], size, cubic, top, vertical);
            long horizontal_taps = weigh(box[3], size, cubic, left, horizontal);
            for (long plane = image * planes; plane < (image + 1) * planes; plane++) {
                const uint8_t *corner = images + (plane * height + box[0]) * stride + box[1] * together;
                down(corner, stride, box[3] * together, size, top, vertical, vertical_taps, rows);
                for (long c = 0; c < together; c++)
                    across(rows + c, box[3] * together, together, size, left, horizontal, horizontal_taps,
                           results + (plane * together + c) * size * size);
            }
        }
    }
}
