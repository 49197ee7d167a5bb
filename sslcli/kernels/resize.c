/* Crops of uint8 images, resized with antialiasing: the same weights as `resized_crop` in data/views/augment.py, without
   the products with zero weights. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

const unsigned source_checksum = SOURCE_CHECKSUM; /* see setup.py */

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

INLINE four load(const float *from) { return *(const four *)from; }

INLINE float limited(float value) {
    value = value < 0 ? 0 : value;
    return value > 1 ? 1 : value;
}

/* Keys' cubic filter with a = -0.5, or the triangle filter, at a distance >= 0. */
INLINE float filter(float distance, int cubic) {
    if (!cubic) return distance < 1 ? 1 - distance : 0;
    if (distance < 1) return (1.5f * distance - 2.5f) * distance * distance + 1;
    return distance < 2 ? ((2.5f - 0.5f * distance) * distance - 4) * distance + 2 : 0;
}

/* First source pixel and weights of each of `size` output pixels; returns the number of weights per output pixel. */
INLINE long weigh(long length, long size, int cubic, long *first, float *weights) {
    float scale = (float)length / size, narrow = scale > 1 ? 1 / scale : 1, reach = (cubic ? 2 : 1) / narrow;
    long taps = (long)ceilf(2 * reach);
    if (taps > length) taps = length;
    for (long i = 0; i < size; i++) {
        float start = (i + 0.5f) * scale - reach + 0.5f, center = (i + 0.5f) * (scale * narrow), sum = 0;
        first[i] = start > 0 ? (long)start : 0; /* the first whose middle is within reach */
        if (first[i] > length - taps) first[i] = length - taps;
        for (long k = 0; k < taps; k++) {
            weights[i * taps + k] = filter(fabsf((first[i] + k + 0.5f) * narrow - center), cubic);
            sum += weights[i * taps + k];
        }
        for (long k = 0; k < taps; k++) weights[i * taps + k] /= sum;
    }
    return taps;
}

/* One output row, from uint8 rows that are `stride` apart. */
INLINE void down(const uint8_t *bytes, long stride, long used, const float *weights, long taps, float *row) {
    float once = weights[0] / 255;
    for (long x = 0; x < used; x++) row[x] = once * bytes[x];
    for (long k = 1; k < taps; k++) {
        const uint8_t *from = bytes + k * stride;
        float weight = weights[k] / 255;
        for (long x = 0; x < used; x++) row[x] += weight * from[x];
    }
}

/* Output pixels in [0, 1] from a row of one channel. */
INLINE void across(const float *row, long size, const long *first, const float *weights, long taps, float *out) {
    for (long i = 0; i < size; i++) {
        const float *from = row + first[i];
        float sum = weights[i * taps] * from[0];
        if (taps == 2) /* upsampling, as for most crops of small images: no loop */
            sum += weights[i * taps + 1] * from[1];
        else
            for (long k = 1; k < taps; k++) sum += weights[i * taps + k] * from[k];
        out[i] = limited(sum);
    }
}

/* The same for three interleaved channels, summed in one vector; its fourth lane belongs to the next pixel. */
INLINE void three_across(const float *row, long size, const long *first, const float *weights, long taps, float *quads,
                         float *out) {
    for (long i = 0; i < size; i++) {
        const float *from = row + 3 * first[i];
        four sum = weights[i * taps] * load(from);
        for (long k = 1; k < taps; k++) sum += weights[i * taps + k] * load(from + 3 * k);
        *(four *)(quads + 4 * i) = sum;
    }
    for (int c = 0; c < 3; c++)
        for (long i = 0; i < size; i++) out[c * size + i] = limited(quads[4 * i + c]);
}

/* Images are (n, planes, height, width, together) uint8: `together` is 1 if each channel is a plane, and 3, with one
   plane, if channels are interleaved. Boxes are (n, 4): top, left, height, width. The output is (n, channels, size, size):
   floats in [0, 1], or uint8 if `numbers` is null. `scratch` holds width x together + 1 + size x (together + 4 + height +
   width) floats per thread. */
void resized_crops(const uint8_t *images, const int64_t *boxes, float *numbers, uint8_t *bytes, float *scratch, long n,
                   long planes, long height, long width, long together, long size, int cubic, int threads) {
    long stride = width * together, place = stride + 1 + size * (together + 4 + height + width);
#pragma omp parallel num_threads(threads)
    {
        float *row = scratch + omp_get_thread_num() * place, *line = row + stride + 1;
        float *quads = line + size * together, *vertical = quads + 4 * size, *horizontal = vertical + size * height;
        long top[size], left[size];
#pragma omp for schedule(static)
        for (long image = 0; image < n; image++) {
            const int64_t *box = boxes + 4 * image;
            long taps = weigh(box[2], size, cubic, top, vertical);
            long horizontal_taps = weigh(box[3], size, cubic, left, horizontal);
            for (long plane = image * planes; plane < (image + 1) * planes; plane++) {
                const uint8_t *corner = images + (plane * height + box[0]) * stride + box[1] * together;
                for (long y = 0; y < size; y++) {
                    down(corner + top[y] * stride, stride, box[3] * together, vertical + y * taps, taps, row);
                    if (together == 3)
                        three_across(row, size, left, horizontal, horizontal_taps, quads, line);
                    else
                        across(row, size, left, horizontal, horizontal_taps, line);
                    for (long c = 0; c < together; c++) {
                        long at = ((plane * together + c) * size + y) * size;
                        if (numbers)
                            memcpy(numbers + at, line + c * size, sizeof(float) * size);
                        else
                            for (long i = 0; i < size; i++) bytes[at + i] = (uint8_t)(int)(line[c * size + i] * 255 + 0.5f);
                    }
                }
            }
        }
    }
}
