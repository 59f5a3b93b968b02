/* What plain tensor operations do slowly on a CPU. Of the KH rule: whole minibatches of it, with the activities of a few
   patches at a time in the nearest cache, where the winner and the m-th most active neuron are found. Of the BP twin:
   convolution and max-pooling in one pass over the image, and their gradient, which only the places that won the pooling
   have. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define VL 16
#define ROWS 12 /* filters computed together: their sums fill the registers */
#else
#define VL 8
#define ROWS 6
#endif
#define LANES (2 * VL) /* patches side by side */
#define MOST 8         /* largest m served */
typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4)));

#define CHOOSE(mask, a, b) ((vf)(((vi)(a) & (mask)) | ((vi)(b) & ~(mask))))
static inline int any(vi a)
{
    int32_t all = 0;
    for (int i = 0; i < VL; i++) all |= a[i];
    return all != 0;
}

/* Activities of all filters (packed ROWS at a time, padded) for LANES patches: h[f][lane], and the best m values. */
static inline __attribute__((always_inline)) void
activities(const float *columns, const float *packed, int64_t F, int64_t D, int m, float *h, vf best[MOST][2])
{
    for (int r = 0; r < m; r++) best[r][0] = best[r][1] = (vf){0} - INFINITY;
    for (int64_t f = 0; f < F; f += ROWS, packed += ROWS * D) {
        vf sum[ROWS][2];
        for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = (vf){0};
        for (int64_t d = 0; d < D; d++) {
            vf a = *(const vf *)(columns + d * LANES), b = *(const vf *)(columns + d * LANES + VL);
            for (int i = 0; i < ROWS; i++) {
                float x = packed[d * ROWS + i];
                sum[i][0] += a * x;
                sum[i][1] += b * x;
            }
        }
        for (int i = 0; i < ROWS && f + i < F; i++)
            for (int q = 0; q < 2; q++) {
                vf x = sum[i][q];
                *(vf *)(h + (f + i) * LANES + q * VL) = x;
                for (int r = 0; r < m; r++) {
                    vf y = best[r][q];
                    vi more = x > y;
                    best[r][q] = CHOOSE(more, x, y);
                    x = CHOOSE(more, y, x);
                }
            }
    }
}

#define CASE(M) case M: activities(columns, packed, F, D, M, h, best); break;

static void select_lanes(const float *columns, const float *packed, int64_t F, int64_t D, int m, float *h, int32_t *winner,
                         int32_t *inhibited)
{
    vf best[MOST][2];
    switch (m) { CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
    for (int q = 0; q < 2; q++) {
        vf first = best[0][q], last = best[m - 1][q];
        vi at_first = (vi){0} - 1, at_last = at_first;
        for (int64_t f = F - 1; f >= 0; f--) { /* downwards: of equals the lowest index stays */
            vf x = *(const vf *)(h + f * LANES + q * VL);
            vi number = (vi){0} + (int32_t)f, a = x == first, b = x == last;
            at_first = (number & a) | (at_first & ~a);
            at_last = (number & b) | (at_last & ~b);
        }
        *(vi *)(winner + q * VL) = at_first;
        *(vi *)(inhibited + q * VL) = at_last;
        if (any(best[m - 2][q] == last)) /* a tie with the next better: the m-th is a later one of the equals */
            for (int j = 0; j < VL; j++) {
                int above = 0;
                for (int r = 0; r < m - 1; r++) above += best[r][q][j] == last[j];
                for (int64_t f = 0; f < F; f++)
                    if (h[f * LANES + q * VL + j] == last[j] && above-- == 0) { inhibited[q * VL + j] = (int32_t)f; break; }
            }
    }
}

static inline __attribute__((always_inline)) void
row(const uint8_t *from, int64_t C, int64_t H, int64_t W, int64_t w, float *to)
{
    for (int64_t c = 0; c < C; c++)
        for (int64_t r = 0; r < w; r++, to += w)
            for (int64_t j = 0; j < w; j++) to[j] = from[(c * H + r) * W + j] * (1 / 255.0f);
}

/* Patches number ids[0..count) of uint8 images (C, H, W), counted image by image and row by row, of values v / 255: as
   rows (count, D), and as columns (blocks, D, LANES), LANES patches side by side, the last block padded with zeros. */
void khnb_gather(const uint8_t *images, int64_t C, int64_t H, int64_t W, int64_t w, const int64_t *ids, int64_t count,
                 float *rows, float *columns)
{
    int64_t across = W - w + 1, each = (H - w + 1) * across, D = C * w * w;
    for (int64_t b = 0; b < count; b += LANES, rows += LANES * D, columns += LANES * D) {
        int64_t here = count - b < LANES ? count - b : LANES;
        for (int64_t j = 0; j < here; j++) {
            int64_t place = ids[b + j] % each;
            const uint8_t *from = images + ids[b + j] / each * C * H * W + place / across * W + place % across;
            switch (w) { /* the usual widths, unrolled */
            case 4: row(from, C, H, W, 4, rows + j * D); break;
            case 8: row(from, C, H, W, 8, rows + j * D); break;
            case 12: row(from, C, H, W, 12, rows + j * D); break;
            default: row(from, C, H, W, w, rows + j * D);
            }
        }
        if (here < LANES) memset(columns, 0, sizeof(float) * LANES * D);
        for (int64_t d = 0; d < D; d += 16) /* in pieces that stay in the nearest cache */
            for (int64_t j = 0; j < here; j++) {
                const float *piece = rows + j * D + d;
                float *to = columns + d * LANES + j;
                if (d + 16 <= D)
                    for (int64_t i = 0; i < 16; i++) to[i * LANES] = piece[i];
                else
                    for (int64_t i = 0; i < D - d; i++) to[i * LANES] = piece[i];
            }
    }
}

static inline __attribute__((always_inline)) void
inverse_norms(const float *rows, int64_t count, int64_t D, int p, float *scales)
{
    for (int64_t i = 0; i < count; i++, rows += D) {
        float sum = 0;
        for (int64_t d = 0; d < D; d++) {
            float power = rows[d];
            for (int q = 1; q < p; q++) power *= rows[d];
            sum += power;
        }
        scales[i] = sum > 0 ? 1 / (p == 2 ? sqrtf(sum) : powf(sum, 1.0f / p)) : 0;
    }
}

/* 1 / p-norm of each row, 0 for an all-zero one. */
void khnb_scales(const float *rows, int64_t count, int64_t D, int p, float *scales)
{
    switch (p) { /* the usual orders, unrolled */
    case 2: inverse_norms(rows, count, D, 2, scales); break;
    case 3: inverse_norms(rows, count, D, 3, scales); break;
    case 4: inverse_norms(rows, count, D, 4, scales); break;
    case 5: inverse_norms(rows, count, D, 5, scales); break;
    case 6: inverse_norms(rows, count, D, 6, scales); break;
    default: inverse_norms(rows, count, D, p, scales);
    }
}

/* What a caller must know to make room: patches side by side, filters computed together, largest m. */
void khnb_sizes(int64_t *sizes)
{
    sizes[0] = LANES;
    sizes[1] = ROWS;
    sizes[2] = MOST;
}

/* Updates of one layer (eqs. 4.3-4.7), one minibatch after the other: rows, columns and scales (1 / p-norm) as made above,
   weight (F, D) changed in place, wins (F) counted up. by_q: neurons are ranked by Q; by_max: an update is divided by its
   largest entry, else by the number of patches. scratch: groups * ROWS * (D + LANES) + F * (D + 2) floats, where groups is
   F / ROWS rounded up. Returns how many updates were done: fewer than asked where one stops being finite. */
int64_t khnb_learn(const float *rows, const float *columns, const float *scales, int64_t batch, int64_t updates, int64_t D,
                   float *weight, int64_t F, int p, int m, float delta, float eta, int by_q, int by_max, int64_t *wins,
                   float *scratch)
{
    int64_t blocks = (batch + LANES - 1) / LANES, groups = (F + ROWS - 1) / ROWS;
    float *packed = scratch, *h = packed + groups * ROWS * D, *change = h + groups * ROWS * LANES, *sums = change + F * D,
          *size = sums + F;
    memset(packed, 0, sizeof(float) * groups * ROWS * D);
    for (int64_t u = 0; u < updates; u++, rows += batch * D, columns += blocks * D * LANES, scales += batch) {
        for (int64_t f = 0; f < F; f++) { /* sgn(W) |W|^(p-1), side by side for ROWS filters */
            const float *from = weight + f * D;
            float *to = packed + f / ROWS * ROWS * D + f % ROWS, total = 0;
            for (int64_t d = 0; d < D; d++) {
                float x = from[d], a = fabsf(x);
                for (int q = 2; q < p; q++) x *= a;
                to[d * ROWS] = x;
                total += fabsf(x) * a;
            }
            size[f] = 1;
            if (by_q && total > 0) {
                size[f] = powf(total, (p - 1.0f) / p);
                for (int64_t d = 0; d < D; d++) to[d * ROWS] /= size[f];
            }
        }
        memset(change, 0, sizeof(float) * (F * D + F));
        for (int64_t b = 0; b < blocks; b++) {
            int32_t winner[LANES], inhibited[LANES];
            select_lanes(columns + b * D * LANES, packed, F, D, m, h, winner, inhibited);
            for (int64_t j = 0; j < LANES && b * LANES + j < batch; j++) {
                const float *v = rows + (b * LANES + j) * D;
                int64_t k = winner[j], l = inhibited[j];
                if (k < 0 || l < 0) return u; /* no neuron is the best: an activity is not a number */
                float scale = scales[b * LANES + j], minus = -delta * scale, *up = change + k * D, *down = change + l * D;
                for (int64_t d = 0; d < D; d++) up[d] += scale * v[d];
                for (int64_t d = 0; d < D; d++) down[d] += minus * v[d];
                sums[k] += scale * h[k * LANES + j] * size[k];
                sums[l] += minus * h[l * LANES + j] * size[l];
                wins[k]++;
            }
        }
        float most = 0, total = 0;
        for (int64_t f = 0; f < F; f++)
            for (int64_t d = 0; d < D; d++) {
                float x = change[f * D + d] -= sums[f] * weight[f * D + d];
                most = fabsf(x) > most ? fabsf(x) : most;
                total += x * 0; /* not a number as soon as one of them is none, or infinite */
            }
        if (!(total == 0)) return u;
        float step = eta / (!by_max ? batch : most > 1e-30f ? most : 1e-30f);
        for (int64_t i = 0; i < F * D; i++) weight[i] += step * change[i];
    }
    return updates;
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
