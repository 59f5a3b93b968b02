/* What plain tensor operations do slowly on a CPU. Of the KH rule: gathering unit-norm patches at random places, and
   finding the winner and the m-th most active neuron of every patch. Of the BP twin: convolution and max-pooling in
   one pass over the image, and their gradient, which only the places that won the pooling have. */
#include <math.h>
#include <stdint.h>

static inline __attribute__((always_inline)) void
unit_patch(const uint8_t *from, int64_t C, int64_t H, int64_t W, int64_t w, int p, float *patch)
{
    float *to = patch, sum = 0;
    for (int64_t c = 0; c < C; c++)
        for (int64_t r = 0; r < w; r++, to += w)
            for (int64_t j = 0; j < w; j++) to[j] = from[(c * H + r) * W + j] * (1 / 255.0f);
    for (int64_t d = 0; d < C * w * w; d++) {
        float power = patch[d];
        for (int q = 1; q < p; q++) power *= patch[d];
        sum += power;
    }
    float scale = sum > 0 ? 1 / powf(sum, 1.0f / p) : 0;
    for (int64_t d = 0; d < C * w * w; d++) patch[d] *= scale;
}

/* Patches number ids[0..count) of uint8 images (C, H, W), counted image by image and row by row, as floats of
   unit p-norm; an all-zero patch stays zero. p is a whole number. */
void khnb_patches(const uint8_t *images, int64_t C, int64_t H, int64_t W, int64_t w, const int64_t *ids,
                  int64_t count, int p, float *out)
{
    int64_t across = W - w + 1, each = (H - w + 1) * across, size = C * w * w;
    for (int64_t i = 0; i < count; i++) {
        int64_t place = ids[i] % each;
        const uint8_t *from = images + ids[i] / each * C * H * W + place / across * W + place % across;
        float *patch = out + i * size;
        if (w == 4 && C == 3 && p == 2) unit_patch(from, 3, H, W, 4, 2, patch); /* the usual case, unrolled */
        else if (w == 4) unit_patch(from, C, H, W, 4, p, patch);
        else unit_patch(from, C, H, W, w, p, patch);
    }
}

#define LANES 16 /* patches side by side: one cache line of floats */

static inline __attribute__((always_inline)) void
block(const float *h, int64_t neurons, int64_t stride, int lanes, int m, int64_t *winner, int64_t *inhibited)
{
    float best[16][LANES];
    int32_t at[16][LANES];
    for (int r = 0; r < m; r++)
        for (int j = 0; j < LANES; j++) { best[r][j] = -INFINITY; at[r][j] = r; }
    for (int64_t f = 0; f < neurons; f++) {
        float x[LANES];
        int any = 0;
        for (int j = 0; j < LANES; j++) x[j] = lanes == LANES || j < lanes ? h[f * stride + j] : -INFINITY;
        for (int j = 0; j < LANES; j++) any |= x[j] > best[m - 1][j];
        if (!any) continue; /* nearly always: few neurons enter the best m */
        for (int r = m - 1; r >= 0; r--)
            for (int j = 0; j < LANES; j++) {
                int here = x[j] > best[r][j]; /* strictly: an equal, later neuron ranks lower */
                int above = r > 0 && x[j] > best[r ? r - 1 : 0][j];
                float value = above ? best[r ? r - 1 : 0][j] : x[j];
                int32_t index = above ? at[r ? r - 1 : 0][j] : (int32_t)f;
                best[r][j] = here ? value : best[r][j];
                at[r][j] = here ? index : at[r][j];
            }
    }
    for (int j = 0; j < lanes; j++) { winner[j] = at[0][j]; inhibited[j] = at[m - 1][j]; }
}

#define CASE(M) case M: \
    for (j = 0; j + LANES <= patches; j += LANES) block(h + j, neurons, patches, LANES, M, winner + j, inhibited + j); \
    if (j < patches) block(h + j, neurons, patches, (int)(patches - j), M, winner + j, inhibited + j); \
    return 0;

/* Winner and m-th of each column of h (neurons, patches); ties: lower index ranks higher.
   0 when done, 1 when m is not served here. */
int khnb_rank(const float *h, int64_t neurons, int64_t patches, int m, int64_t *winner, int64_t *inhibited)
{
    int64_t j;
    switch (m) {
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        default: return 1;
    }
}

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));
#define ACROSS 6 /* positions computed together */

/* One row of the convolution: row[x][f] for all x. weight is (D, filters), filters a multiple of 16. */
static void conv_row(const float *image, const int32_t *offset, int64_t D, const float *weight, const float *bias,
                     int64_t filters, int64_t out, float *row)
{
    for (int64_t f = 0; f < filters; f += 16)
        for (int64_t x = 0; x < out; x += ACROSS) {
            if (x + ACROSS > out) x = out - ACROSS; /* the last block overlaps: the same values again */
            v8 sum[ACROSS][2];
            for (int i = 0; i < ACROSS; i++) {
                sum[i][0] = *(const v8 *)(bias + f);
                sum[i][1] = *(const v8 *)(bias + f + 8);
            }
            for (int64_t d = 0; d < D; d++) {
                v8 a = *(const v8 *)(weight + d * filters + f), b = *(const v8 *)(weight + d * filters + f + 8);
                const float *at = image + offset[d] + x;
                for (int i = 0; i < ACROSS; i++) { sum[i][0] += a * at[i]; sum[i][1] += b * at[i]; }
            }
            for (int i = 0; i < ACROSS; i++) {
                *(v8 *)(row + (x + i) * filters + f) = sum[i][0];
                *(v8 *)(row + (x + i) * filters + f + 8) = sum[i][1];
            }
        }
}

/* Of q values, step apart, the largest and its place, for 8 filters side by side. Places are given (at, step apart) or
   counted up from first. An equal, later value does not count, as in the usual max-pooling. */
static inline __attribute__((always_inline)) void
largest(const float *value, const int32_t *at, int32_t first, int64_t step, int64_t q, float *top, int32_t *top_at)
{
    v8 best = *(const v8 *)value;
    v8i where = at ? *(const v8i *)at : (v8i){0} + first;
    for (int64_t j = 1; j < q; j++) {
        v8 next = *(const v8 *)(value + j * step);
        v8i here = at ? *(const v8i *)(at + j * step) : (v8i){0} + (first + (int32_t)j);
        v8i more = next > best; /* all bits set where true */
        best = (v8)(((v8i)next & more) | ((v8i)best & ~more));
        where = (here & more) | (where & ~more);
    }
    *(v8 *)top = best;
    *(v8i *)top_at = where;
}

/* Convolution with bias, then max-pooling (window q, stride s): images (count, C, H, W) -> out (count, total, P, P), and
   the place that won, y * W + x, in where; both point at the first of the F filters done here, weight is (D, filters),
   filters >= F a multiple of 16. Side of the convolution at least 6. scratch: see khnb/native.py. */
void khnb_conv_pool(const float *images, int64_t count, int64_t C, int64_t H, int64_t W, int64_t w, const float *weight,
                    const float *bias, int64_t filters, int64_t F, int64_t total, int64_t q, int64_t s, float *scratch,
                    float *out, int32_t *where)
{
    int64_t side = H - w + 1, across = W - w + 1, P = (side - q) / s + 1, X = (across - q) / s + 1, D = C * w * w;
    float *row = scratch, *best = row + across * filters;
    int32_t *at = (int32_t *)(best + side * X * filters), *offset = at + side * X * filters;
    for (int64_t c = 0, d = 0; c < C; c++)
        for (int64_t r = 0; r < w; r++)
            for (int64_t j = 0; j < w; j++) offset[d++] = (int32_t)((c * H + r) * W + j);
    for (int64_t n = 0; n < count; n++, images += C * H * W, out += total * P * X, where += total * P * X) {
        for (int64_t y = 0; y < side; y++) {
            conv_row(images + y * W, offset, D, weight, bias, filters, across, row);
            for (int64_t x = 0; x < X; x++)
                for (int64_t f = 0; f < filters; f += 8)
                    largest(row + x * s * filters + f, 0, (int32_t)(y * W + x * s), filters, q,
                            best + (y * X + x) * filters + f, at + (y * X + x) * filters + f);
        }
        for (int64_t f = 0; f < F; f += 8)
            for (int64_t y = 0; y < P; y++)
                for (int64_t x = 0; x < X; x++) {
                    int64_t from = (y * s * X + x) * filters + f;
                    float top[8];
                    int32_t top_at[8];
                    largest(best + from, at + from, 0, X * filters, q, top, top_at);
                    for (int64_t l = 0; l < 8 && f + l < F; l++) {
                        out[((f + l) * P + y) * X + x] = top[l];
                        where[((f + l) * P + y) * X + x] = top_at[l];
                    }
                }
    }
}

/* The gradient of the filters (F, C, w, w) and of the bias, added to dweight and dbias: grad and where are (count, F, Q). */
void khnb_conv_pool_back(const float *images, int64_t count, int64_t C, int64_t H, int64_t W, int64_t w,
                         const float *grad, const int32_t *where, int64_t F, int64_t Q, float *dweight, float *dbias)
{
    int64_t D = C * w * w;
    for (int64_t n = 0; n < count; n++, images += C * H * W)
        for (int64_t f = 0; f < F; f++, grad += Q, where += Q) {
            float *to = dweight + f * D;
            float total = 0;
            for (int64_t k = 0; k < Q; k++) total += grad[k];
            dbias[f] += total;
            if (w == 4 && C == 3) { /* the usual case, kept in registers */
                v4 sum[12];
                for (int i = 0; i < 12; i++) sum[i] = *(v4 *)(to + 4 * i);
                for (int64_t k = 0; k < Q; k++) {
                    const float *from = images + where[k];
                    for (int i = 0; i < 12; i++) sum[i] += *(const v4 *)(from + (i / 4 * H + i % 4) * W) * grad[k];
                }
                for (int i = 0; i < 12; i++) *(v4 *)(to + 4 * i) = sum[i];
                continue;
            }
            for (int64_t k = 0; k < Q; k++)
                for (int64_t c = 0; c < C; c++)
                    for (int64_t r = 0; r < w; r++)
                        for (int64_t j = 0; j < w; j++)
                            to[(c * w + r) * w + j] += grad[k] * images[where[k] + (c * H + r) * W + j];
        }
}
