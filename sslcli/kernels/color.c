/* Flip, color operations and normalization of a view, one image after the other; each thread has images of its own. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

const unsigned source_checksum = SOURCE_CHECKSUM; /* see setup.py */

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };
enum { FLIPPED, JITTERED, GRAY, BLURRED, SOLARIZED };

INLINE float limited(float value) {
    value = value < 0 ? 0 : value;
    return value > 1 ? 1 : value;
}

INLINE float luma(float red, float green, float blue) { return 0.2989f * red + 0.587f * green + 0.114f * blue; }

/* Gray value of pixel i of an image with one or three channels; planes are `pixels` apart. */
INLINE float gray_of(const float *image, long channels, long pixels, long i) {
    return channels == 1 ? image[i] : luma(image[i], image[pixels + i], image[2 * pixels + i]);
}

static float mean_gray(const float *image, long channels, long pixels) {
    enum { SUMS = 32 }; /* in vectors, and nearer to the exact sum than one after the other */
    float sums[SUMS] = {0}, sum = 0;
    long whole = pixels / SUMS * SUMS;
    for (long start = 0; start < whole; start += SUMS)
        for (int i = 0; i < SUMS; i++) sums[i] += gray_of(image, channels, pixels, start + i);
    for (int i = 0; i < SUMS; i++) sum += sums[i];
    for (long i = whole; i < pixels; i++) sum += gray_of(image, channels, pixels, i);
    return sum / pixels;
}

/* Rotate the hue in HSV, with the formulas of `rotate_hue` in data/views/color.py. */
static void rotate_hue(float *restrict image, long pixels, float turns) {
    float *restrict reds = image, *restrict greens = image + pixels, *restrict blues = image + 2 * pixels;
    for (long i = 0; i < pixels; i++) {
        float red = reds[i], green = greens[i], blue = blues[i];
        float value = red > green ? red : green, least = red < green ? red : green;
        value = value > blue ? value : blue;
        least = least < blue ? least : blue;
        float chroma = value - least, sixth = 1.0f / 6;
        float hue = (green + blue - red - least) / (chroma > 1.17549435e-38f ? chroma : 1.17549435e-38f);
        hue = copysignf(hue + 1, green - blue) + turns * 6;
        float whole = (float)(int)(hue * sixth);
        hue -= (whole > hue * sixth ? whole - 1 : whole) * 6;
        reds[i] = value - chroma * limited(2 - fabsf(hue - 3));
        greens[i] = value - chroma * limited(fabsf(hue - 2) - 1);
        blues[i] = value - chroma * limited(fabsf(hue - 4) - 1);
    }
}

static void saturate(float *restrict image, long pixels, float factor) {
    float *restrict reds = image, *restrict greens = image + pixels, *restrict blues = image + 2 * pixels;
    for (long i = 0; i < pixels; i++) {
        float gray = (1 - factor) * luma(reds[i], greens[i], blues[i]);
        reds[i] = limited(factor * reds[i] + gray);
        greens[i] = limited(factor * greens[i] + gray);
        blues[i] = limited(factor * blues[i] + gray);
    }
}

static void jitter(float *image, long channels, long pixels, const float *factors, const int64_t *order) {
    for (int slot = 0; slot < 4; slot++) {
        float factor = factors[order[slot]], added = 0;
        switch (order[slot]) {
        case HUE:
            if (factor != 0 && channels == 3) rotate_hue(image, pixels, factor);
            break;
        case SATURATION:
            if (factor != 1 && channels == 3) saturate(image, pixels, factor);
            break;
        case CONTRAST:
            if (factor != 1) added = (1 - factor) * mean_gray(image, channels, pixels); /* fall through */
        case BRIGHTNESS:
            if (factor != 1)
                for (long i = 0; i < channels * pixels; i++) image[i] = limited(factor * image[i] + added);
        }
    }
}

static void to_gray(float *image, long channels, long pixels) {
    if (channels == 1) return;
    for (long i = 0; i < pixels; i++) image[i] = luma(image[i], image[pixels + i], image[2 * pixels + i]);
    memcpy(image + pixels, image, sizeof(float) * pixels);
    memcpy(image + 2 * pixels, image, sizeof(float) * pixels);
}

/* Gaussian blur of a plane with reflected borders, columns first, then rows. `scratch` holds a plane and a padded row. */
static void blur(float *restrict plane, long height, long width, float sigma, long taps, float *restrict scratch) {
    long radius = taps / 2;
    float kernel[taps], sum = 0, *restrict row = scratch + height * width;
    for (long t = 0; t < taps; t++) sum += kernel[t] = expf(-0.5f * (t - radius) * (t - radius) / (sigma * sigma));
    for (long t = 0; t < taps; t++) kernel[t] /= sum;
    for (long y = 0; y < height; y++) {
        float *restrict to = scratch + y * width;
        for (long x = 0; x < width; x++) to[x] = 0;
        for (long t = 0; t < taps; t++) {
            long from = labs(y + t - radius);
            const float *line = plane + (from < height ? from : 2 * height - 2 - from) * width;
            for (long x = 0; x < width; x++) to[x] += kernel[t] * line[x];
        }
    }
    for (long y = 0; y < height; y++) {
        const float *from = scratch + y * width;
        float *restrict to = plane + y * width;
        memcpy(row + radius, from, sizeof(float) * width);
        for (long x = 1; x <= radius; x++) {
            row[radius - x] = from[x];
            row[radius + width - 1 + x] = from[width - 1 - x];
        }
        for (long x = 0; x < width; x++) to[x] = 0;
        for (long t = 0; t < taps; t++)
            for (long x = 0; x < width; x++) to[x] += kernel[t] * row[x + t];
    }
}

static void copy(const float *restrict from, float *restrict to, long rows, long width, int flipped) {
    if (!flipped)
        memcpy(to, from, sizeof(float) * rows * width);
    else
        for (long y = 0; y < rows; y++)
            for (long x = 0; x < width; x++) to[y * width + x] = from[y * width + width - 1 - x];
}

/* Images (n, channels, height, width) in [0, 1] with one or three channels -> (n, height, width, channels), normalized
   with `mean` and `std` per channel. `flags` is (5, n), `factors` and `order` (n, 4), `sigma` (n,).
   `scratch` holds (channels + 1) x height x width + width + taps floats per thread. */
void color_operations(const float *images, float *out, float *scratch, const uint8_t *flags, const float *factors,
            const int64_t *order, const float *sigma, const float *mean, const float *std, long n, long channels,
            long height, long width, long taps, float threshold, int gray_first, int threads) {
    long pixels = height * width, place = (channels + 1) * pixels + width + taps;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (long i = 0; i < n; i++) {
        float *image = scratch + omp_get_thread_num() * place, *to = out + i * channels * pixels;
        copy(images + i * channels * pixels, image, channels * height, width, flags[FLIPPED * n + i]);
        if (flags[GRAY * n + i] && gray_first) to_gray(image, channels, pixels);
        if (flags[JITTERED * n + i]) jitter(image, channels, pixels, factors + 4 * i, order + 4 * i);
        if (flags[GRAY * n + i] && !gray_first) to_gray(image, channels, pixels);
        if (flags[BLURRED * n + i])
            for (long c = 0; c < channels; c++)
                blur(image + c * pixels, height, width, sigma[i], taps, image + channels * pixels);
        if (flags[SOLARIZED * n + i])
            for (long p = 0; p < channels * pixels; p++) image[p] = image[p] >= threshold ? 1 - image[p] : image[p];
        for (long c = 0; c < channels; c++)
            for (long p = 0; p < pixels; p++) image[c * pixels + p] = (image[c * pixels + p] - mean[c]) / std[c];
        if (channels == 1)
            memcpy(to, image, sizeof(float) * pixels);
        else
            for (long p = 0; p < pixels; p++)
                for (int c = 0; c < 3; c++) to[3 * p + c] = image[c * pixels + p];
    }
}
