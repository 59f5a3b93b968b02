/* What plain tensor operations do slowly on a CPU. Of the KH rule: whole minibatches of it, with the activities of a few
   patches at a time in the nearest cache, where the winner and the m-th most active neuron are found. Of the network:
   convolution, the norms of patches and max-pooling in one pass over the image, and their gradients, which only the places that won the
   pooling have. Of classifiers: many of them on the same features. Activation functions with their powers. */
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

#define ACROSS 6 /* positions computed together, for two vectors of filters: their sums fill half of the registers or more */

/* Places x and on in one row of the convolution, for so many vectors of filters from f on: row[x][f]. */
static inline __attribute__((always_inline)) void
conv_places(const float *image, const int32_t *offset, int64_t D, const float *weight, const float *bias, const float *scale,
            int64_t filters, int64_t f, int64_t x, int vectors, float *row)
{
    vf sum[ACROSS][2];
    for (int i = 0; i < ACROSS; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = *(const vf *)(bias + f + v * VL);
    for (int64_t d = 0; d < D; d++) {
        const float *at = image + offset[d] + x;
        vf a[2];
        for (int v = 0; v < vectors; v++) a[v] = *(const vf *)(weight + d * filters + f + v * VL);
        for (int i = 0; i < ACROSS; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += a[v] * at[i];
    }
    for (int i = 0; i < ACROSS; i++)
        for (int v = 0; v < vectors; v++) *(vf *)(row + (x + i) * filters + f + v * VL) = sum[i][v] * (scale ? scale[x + i] : 1);
}

/* One row of the convolution: row[x][f] for all x, each x times its scale if there are any. weight is (D, filters), filters
   a multiple of 16. */
static void conv_row(const float *image, const int32_t *offset, int64_t D, const float *weight, const float *bias,
                     const float *scale, int64_t filters, int64_t out, float *row)
{
    for (int64_t f = 0; f < filters; f += 2 * VL)
        for (int64_t x = 0; x < out; x += ACROSS) {
            if (x + ACROSS > out) x = out - ACROSS; /* the last block overlaps: the same values again */
            if (f + 2 * VL <= filters)
                conv_places(image, offset, D, weight, bias, scale, filters, f, x, 2, row);
            else
                conv_places(image, offset, D, weight, bias, scale, filters, f, x, 1, row);
        }
}

/* Of q values, step apart, the largest and, if it is asked for, its place, for VL filters side by side. Places are given (at,
   step apart) or counted up from first. An equal, later value does not count, as in the usual max-pooling. */
static inline __attribute__((always_inline)) void
largest(const float *value, const int32_t *at, int32_t first, int64_t step, int64_t q, float *top, int32_t *top_at)
{
    vf best = *(const vf *)value;
    vi where = at ? *(const vi *)at : (vi){0} + first;
    for (int64_t j = 1; j < q; j++) {
        vf next = *(const vf *)(value + j * step);
        vi more = next > best; /* all bits set where true */
        best = CHOOSE(more, next, best);
        if (!top_at) continue;
        vi here = at ? *(const vi *)(at + j * step) : (vi){0} + (first + (int32_t)j);
        where = (here & more) | (where & ~more);
    }
    *(vf *)top = best;
    if (top_at) *(vi *)top_at = where;
}

/* Convolution with bias, each place times its scale (count, side, across) if there are any, then one or more max-poolings
   (window and stride in pools): images (count, C, H, W) -> out[k] (count, total, P, X) of the k-th pooling and, if there is
   where, the places that won, y * W + x; out and where point at the first of the F filters done here, weight is (D, filters),
   filters >= F a multiple of 16. Sides of the convolution at least 6. scratch: see khnb/native.py. */
void khnb_conv_pool(const float *images, int64_t count, int64_t C, int64_t H, int64_t W, int64_t w, const float *weight,
                    const float *bias, const float *scale, int64_t filters, int64_t F, int64_t total, const int64_t *pools,
                    int64_t poolings, float *scratch, float **out, int32_t *where)
{
    int64_t side = H - w + 1, across = W - w + 1, D = C * w * w, room = side * across * filters;
    float *row = scratch, *best = row + across * filters;
    int32_t *at = (int32_t *)(best + poolings * room), *offset = at + (where ? room : 0);
    for (int64_t c = 0, d = 0; c < C; c++)
        for (int64_t r = 0; r < w; r++)
            for (int64_t j = 0; j < w; j++) offset[d++] = (int32_t)((c * H + r) * W + j);
    for (int64_t n = 0; n < count; n++, images += C * H * W) {
        for (int64_t y = 0; y < side; y++) {
            conv_row(images + y * W, offset, D, weight, bias, scale ? scale + (n * side + y) * across : 0, filters, across, row);
            for (int64_t k = 0; k < poolings; k++) {
                int64_t q = pools[2 * k], s = pools[2 * k + 1], X = (across - q) / s + 1;
                for (int64_t x = 0; x < X; x++)
                    for (int64_t f = 0; f < filters; f += VL) {
                        int64_t to = (y * X + x) * filters + f;
                        largest(row + x * s * filters + f, 0, (int32_t)(y * W + x * s), filters, q, best + k * room + to,
                                where ? at + to : 0);
                    }
            }
        }
        for (int64_t k = 0; k < poolings; k++) {
            int64_t q = pools[2 * k], s = pools[2 * k + 1], P = (side - q) / s + 1, X = (across - q) / s + 1;
            for (int64_t f = 0; f < F; f += VL)
                for (int64_t y = 0; y < P; y++)
                    for (int64_t x = 0; x < X; x++) {
                        int64_t from = (y * s * X + x) * filters + f;
                        float top[VL];
                        int32_t top_at[VL];
                        largest(best + k * room + from, where ? at + from : 0, 0, X * filters, q, top, where ? top_at : 0);
                        for (int64_t l = 0; l < VL && f + l < F; l++) {
                            int64_t to = ((n * total + f + l) * P + y) * X + x;
                            out[k][to] = top[l];
                            if (where) where[to] = top_at[l];
                        }
                    }
        }
    }
}

#define STRETCH 48 /* weights of a filter whose gradient is kept in registers, for a few places at a time */
#define PLACES 4

/* gradient[0..STRETCH) += sum over k of grad[k] times the patch at where[k], from its d-th value on. patches (side * across, D). */
static inline __attribute__((always_inline)) void
gather_gradient(const float *patches, int64_t D, const float *grad, const int32_t *place, int64_t Q, float *gradient)
{
    vf sum[PLACES][STRETCH / VL];
    for (int p = 0; p < PLACES; p++)
        for (int i = 0; i < STRETCH / VL; i++) sum[p][i] = (vf){0};
    int64_t k = 0;
    for (; k + PLACES <= Q; k += PLACES)
        for (int p = 0; p < PLACES; p++)
            for (int i = 0; i < STRETCH / VL; i++) sum[p][i] += *(const vf *)(patches + place[k + p] * D + i * VL) * grad[k + p];
    for (; k < Q; k++)
        for (int i = 0; i < STRETCH / VL; i++) sum[0][i] += *(const vf *)(patches + place[k] * D + i * VL) * grad[k];
    for (int i = 0; i < STRETCH / VL; i++)
        *(vf *)(gradient + i * VL) += (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
}

/* Of one filter: the places that won its Q poolings, each once, with the sum of its slopes; returns how many that are not 0. Windows
   overlap, so there are a half to a fifth as many. sum and old, one for each place, are 0 before and after. */
static inline int64_t merge(const float *grad, const int32_t *where, int64_t Q, float *sum, int32_t *old, float *g, int32_t *place)
{
    int64_t found = 0, left = 0;
    for (int64_t k = 0; k < Q; k++) { /* no branch: what comes is not to be foreseen */
        int32_t at = where[k];
        place[found] = at;
        found += !old[at];
        old[at] = 1;
        sum[at] += grad[k];
    }
    for (int64_t k = 0; k < found; k++) {
        int32_t at = place[k];
        place[left] = at;
        g[left] = sum[at];
        left += sum[at] != 0;
        sum[at] = 0;
        old[at] = 0;
    }
    return left;
}

/* The gradient of the filters (F, C, w, w) and of the bias, added to dweight and dbias: grad and where are (count, F, Q).
   scratch: H W (D + 2) + 2 Q floats. */
void khnb_conv_pool_back(const float *images, int64_t count, int64_t C, int64_t H, int64_t W, int64_t w,
                         const float *grad, const int32_t *where, int64_t F, int64_t Q, float *dweight, float *dbias, float *scratch)
{
    int64_t D = C * w * w, side = H - w + 1, across = W - w + 1;
    float *sum = scratch + H * W * D, *g = sum + H * W;
    int32_t *old = (int32_t *)(g + Q), *place = old + H * W;
    memset(sum, 0, sizeof(float) * H * W);
    memset(old, 0, sizeof(int32_t) * H * W);
    for (int64_t n = 0; n < count; n++, images += C * H * W) {
        for (int64_t y = 0; y < side; y++)
            for (int64_t x = 0; x < across; x++) { /* each patch in one piece */
                float *to = scratch + (y * W + x) * D;
                for (int64_t c = 0; c < C; c++)
                    for (int64_t r = 0; r < w; r++, to += w)
                        for (int64_t j = 0; j < w; j++) to[j] = images[(c * H + y + r) * W + x + j];
            }
        for (int64_t f = 0; f < F; f++, grad += Q, where += Q) {
            int64_t some = merge(grad, where, Q, sum, old, g, place), d = 0;
            float total = 0;
            for (int64_t k = 0; k < some; k++) total += g[k];
            dbias[f] += total;
            for (; d + STRETCH <= D; d += STRETCH) gather_gradient(scratch + d, D, g, place, some, dweight + f * D + d);
            for (int64_t k = 0; k < some && d < D; k++)
                for (int64_t i = d; i < D; i++) dweight[f * D + i] += g[k] * scratch[place[k] * D + i];
        }
    }
}

/* The gradient of the images (count, C, H, W) and, if there is scale, of scale (count, side, across), added to dimages and dscale: place by
   place, that of a patch from the filters that won something there, then of the pixels it shares. weight (F, D); grad and where
   (count, F, Q). scratch: D + 3 H W + 4 F Q + F floats. */
void khnb_conv_pool_images(const float *images, const float *weight, int64_t count, int64_t C, int64_t H, int64_t W, int64_t w,
                           const float *grad, const int32_t *where, const float *scale, int64_t F, int64_t Q, float *dimages,
                           float *dscale, float *scratch)
{
    int64_t D = C * w * w, side = H - w + 1, across = W - w + 1, most = F * Q;
    float *patch = scratch, *sum = patch + D, *g = sum + H * W, *sorted = g + most; /* slopes of activities, filter by filter and place by place */
    int32_t *old = (int32_t *)(sorted + most), *end = old + H * W, *place = end + H * W, *filter = place + most, *some = filter + most;
    memset(sum, 0, sizeof(float) * H * W);
    memset(old, 0, sizeof(int32_t) * H * W);
    for (int64_t n = 0; n < count; n++, grad += most, where += most, images += C * H * W, dimages += C * H * W) {
        memset(end, 0, sizeof(int32_t) * H * W);
        for (int64_t f = 0, i = 0; f < F; f++, i += some[f - 1]) {
            some[f] = (int32_t)merge(grad + f * Q, where + f * Q, Q, sum, old, g + i, place + i);
            for (int64_t k = i; k < i + some[f]; k++) end[place[k]]++;
        }
        for (int64_t i = 0, before = 0; i < H * W; i++) {
            int64_t here = end[i];
            end[i] = (int32_t)before; /* where its slopes begin, for now */
            before += here;
        }
        for (int64_t f = 0, i = 0; f < F; f++)
            for (int64_t k = 0; k < some[f]; k++, i++) {
                int32_t to = end[place[i]]++;
                sorted[to] = g[i];
                filter[to] = (int32_t)f;
            }
        for (int64_t y = 0; y < side; y++)
            for (int64_t x = 0; x < across; x++) {
                int64_t at = y * W + x, first = at ? end[at - 1] : 0, d = 0;
                if (first == end[at]) continue;
                float by = scale ? scale[y * across + x] : 1, slope = 0, *from = patch;
                memset(patch, 0, sizeof(float) * D);
                for (; d + STRETCH <= D; d += STRETCH) gather_gradient(weight + d, D, sorted + first, filter + first, end[at] - first, patch + d);
                for (int64_t k = first; k < end[at] && d < D; k++)
                    for (int64_t i = d; i < D; i++) patch[i] += sorted[k] * weight[filter[k] * D + i];
                for (int64_t c = 0; c < C; c++)
                    for (int64_t r = 0; r < w; r++, from += w) {
                        int64_t row = (c * H + y + r) * W + x;
                        for (int64_t j = 0; j < w; j++) slope += from[j] * images[row + j]; /* of the scale: the activities, times their slopes */
                        for (int64_t j = 0; j < w; j++) dimages[row + j] += by * from[j];
                    }
                if (scale) dscale[y * across + x] += slope;
            }
        if (scale) scale += side * across, dscale += side * across;
    }
}

#define IMAGES 64 /* images of a classifier's minibatch done together */
#define DEEP 512  /* features of them at a time */
#define WIDE (2 * VL)
#define OUTS 5 /* outputs computed together */

static inline __attribute__((always_inline)) vf whole_power(vf x, int64_t n)
{
    vf found = (vf){0} + 1;
    int begun = 0;
    for (; n; n >>= 1) { /* repeated squaring, as in khnb/models.py */
        if (n & 1) {
            found = begun ? found * x : x;
            begun = 1;
        }
        if (n > 1) x *= x;
    }
    return found;
}

/* y^n of rows of features (some, D), from d on at most DEEP of them, as (blocks, IMAGES + 1, WIDE), padded with zeros: the
   extra image keeps equal places of the blocks from falling into the same lines of the cache. */
static void powers(const float *y, int64_t some, int64_t D, int64_t d, int64_t n, float *a)
{
    for (int64_t i = 0; i < some; i++, a += WIDE) {
        float *to = a;
        for (int64_t first = d; first < D && first < d + DEEP; first += WIDE, to += (IMAGES + 1) * WIDE) {
            const float *from = y + i * D + first;
            float last[WIDE] = {0};
            if (D - first < WIDE) from = memcpy(last, from, sizeof(float) * (D - first));
            *(vf *)to = whole_power(*(const vf *)from, n);
            *(vf *)(to + VL) = whole_power(*(const vf *)(from + VL), n);
        }
    }
}

/* logits[i][o] += sum over features of a, for images i and i + 1 and OUTS outputs */
static inline __attribute__((always_inline)) void
forward(const float *a, const float *const *rows, int64_t blocks, int64_t O, int both, int outs, float *logits)
{
    vf sum[2][OUTS];
    for (int o = 0; o < OUTS; o++) sum[0][o] = sum[1][o] = (vf){0};
    for (int64_t b = 0; b < blocks; b++, a += (IMAGES + 1) * WIDE)
        for (int q = 0; q < 2; q++) {
            vf x = *(const vf *)(a + q * VL), y = both ? *(const vf *)(a + WIDE + q * VL) : x;
            for (int o = 0; o < outs; o++) {
                vf weight = *(const vf *)(rows[o] + b * WIDE + q * VL);
                sum[0][o] += x * weight;
                if (both) sum[1][o] += y * weight;
            }
        }
    for (int i = 0; i <= both; i++)
        for (int o = 0; o < outs; o++) {
            float total = 0;
            for (int j = 0; j < VL; j++) total += sum[i][o][j];
            logits[i * O + o] += total;
        }
}

/* rows[o][...] += sum over images of gradient[i][o] a[i][...], for one block of features and OUTS outputs */
static inline __attribute__((always_inline)) void
backward(const float *a, const float *gradient, int64_t some, int64_t O, int outs, float *const *rows, int64_t b)
{
    vf sum[OUTS][2];
    for (int o = 0; o < outs; o++)
        for (int q = 0; q < 2; q++) sum[o][q] = *(const vf *)(rows[o] + b * WIDE + q * VL);
    for (int64_t i = 0; i < some; i++, a += WIDE, gradient += O) {
        vf x = *(const vf *)a, y = *(const vf *)(a + VL);
        for (int o = 0; o < outs; o++) {
            sum[o][0] += x * gradient[o];
            sum[o][1] += y * gradient[o];
        }
    }
    for (int o = 0; o < outs; o++)
        for (int q = 0; q < 2; q++) *(vf *)(rows[o] + b * WIDE + q * VL) = sum[o][q];
}

#define WITH_OUTS(call) \
    switch (outs) { case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break; default: call(5); }

/* Softmax classifiers on the same features y^n, y (count, D): mean cross-entropy's gradient, each image weighted with share.
   weight, dweight (heads, classes, D); bias, dbias (heads, classes); the gradients, loss (heads; summed) and
   right (heads; images whose largest logit is the label's) are added to. scratch: see khnb/native.py. */
void khnb_heads(const float *y, const int64_t *labels, int64_t count, int64_t D, int64_t n, float share, int64_t heads,
                int64_t classes, const float *weight, const float *bias, float *dweight, float *dbias, double *loss,
                int64_t *right, float *scratch)
{
    int64_t O = heads * classes, most = DEEP / WIDE;
    float *a = scratch, *tail = a + most * (IMAGES + 1) * WIDE, *logits = tail + OUTS * DEEP;
    for (; count > 0; count -= IMAGES, y += IMAGES * D, labels += IMAGES) {
        int64_t some = count < IMAGES ? count : IMAGES;
        for (int64_t i = 0; i < some; i++) memcpy(logits + i * O, bias, sizeof(float) * O);
        for (int64_t d = 0; d < D; d += DEEP) {
            int64_t here = D - d < DEEP ? D - d : DEEP, blocks = (here + WIDE - 1) / WIDE;
            powers(y, some, D, d, n, a);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t c = 0; c < classes; c += OUTS) {
                    int outs = classes - c < OUTS ? (int)(classes - c) : OUTS;
                    const float *rows[OUTS];
                    for (int o = 0; o < outs; o++) {
                        rows[o] = weight + (h * classes + c + o) * D + d;
                        if (here % WIDE == 0) continue;
                        memset(tail + o * DEEP, 0, sizeof(float) * DEEP); /* a piece that does not fill its last block */
                        rows[o] = memcpy(tail + o * DEEP, rows[o], sizeof(float) * here);
                    }
                    int64_t at = h * classes + c, i = 0;
#define BOTH(outs) for (; i + 1 < some; i += 2) forward(a + i * WIDE, rows, blocks, O, 1, outs, logits + i * O + at)
#define ONE(outs) for (; i < some; i++) forward(a + i * WIDE, rows, blocks, O, 0, outs, logits + i * O + at)
                    WITH_OUTS(BOTH)
                    WITH_OUTS(ONE)
                }
        }
        for (int64_t i = 0; i < some; i++)
            for (int64_t h = 0; h < heads; h++) {
                float *z = logits + i * O + h * classes, top = z[0], of_label = z[labels[i]];
                int64_t guess = 0;
                double total = 0;
                for (int64_t c = 1; c < classes; c++)
                    if (z[c] > top) { top = z[c]; guess = c; }
                for (int64_t c = 0; c < classes; c++) total += z[c] = expf(z[c] - top);
                loss[h] += log(total) - (double)(of_label - top);
                right[h] += guess == labels[i];
                for (int64_t c = 0; c < classes; c++) {
                    z[c] = share * ((float)(z[c] / total) - (c == labels[i]));
                    dbias[h * classes + c] += z[c];
                }
            }
        for (int64_t d = 0; d < D; d += DEEP) {
            int64_t here = D - d < DEEP ? D - d : DEEP, blocks = (here + WIDE - 1) / WIDE;
            powers(y, some, D, d, n, a);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t c = 0; c < classes; c += OUTS) {
                    int outs = classes - c < OUTS ? (int)(classes - c) : OUTS;
                    float *rows[OUTS];
                    for (int o = 0; o < outs; o++) {
                        rows[o] = dweight + (h * classes + c + o) * D + d;
                        if (here % WIDE) rows[o] = memcpy(tail + o * DEEP, rows[o], sizeof(float) * here);
                    }
                    const float *g = logits + h * classes + c;
                    for (int64_t b = 0; b < blocks; b++)
#define BACK(outs) backward(a + b * (IMAGES + 1) * WIDE, g, some, O, outs, rows, b)
                        WITH_OUTS(BACK)
                    if (here % WIDE)
                        for (int o = 0; o < outs; o++) memcpy(dweight + (h * classes + c + o) * D + d, rows[o], sizeof(float) * here);
                }
        }
    }
}

/* e^x = power * (1 + rest) for each of them, power a power of 2: to within 2e-7, in the range where no result is too small or large. */
static inline __attribute__((always_inline)) vf exponential(vf x, vf *power, vf *rest)
{
    vf least = (vf){0} - 87.3f, most = (vf){0} + 88.7f;
    x = CHOOSE(x < least, least, x);
    x = CHOOSE(x > most, most, x);
    vf half = CHOOSE(x < 0, (vf){0} - 0.5f, (vf){0} + 0.5f);
    vi k = __builtin_convertvector(x * 1.44269504f + half, vi);
    vf r = x - __builtin_convertvector(k, vf) * 0.693147180f;
    *rest = r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f)))))));
    vf low = (vf)((k - (k >> 1) + 127) << 23); /* in two, as 2^128 is none */
    *power = (vf)(((k >> 1) + 127) << 23) * low;
    return *power * *rest + *power;
}

/* e^x - 1, near 0 without taking a difference */
static inline __attribute__((always_inline)) vf exponential_less_1(vf x)
{
    vf power, rest, whole = exponential(x, &power, &rest);
    return CHOOSE(power == 1, rest, whole - 1);
}

enum { SIGMOID, TANH, RELU, PRELU, ELU, REXP }; /* as in khnb/native.py */

/* An activation function (eqs. 2.4-2.10; not GeLU, which PyTorch does as fast) and its slope. */
static inline __attribute__((always_inline)) vf activation(vf x, int sigma, float alpha, vf *slope)
{
    vf zero = {0}, one = zero + 1, size = CHOOSE(x < 0, -x, x), power, rest;
    vi positive = x > 0, number = x == x;
    vf below = CHOOSE(positive, zero, x), above = CHOOSE(positive, x, CHOOSE(number, zero, x)), value;
    switch (sigma) {
    case SIGMOID: {
        vf e = exponential(-size, &power, &rest);
        value = CHOOSE(x < 0, e, one) / (1 + e);
        *slope = e / ((1 + e) * (1 + e));
        break;
    }
    case TANH: {
        vf e = exponential_less_1(-2 * size), y = -e / (e + 2);
        value = CHOOSE(x < 0, -y, y);
        *slope = 1 - y * y;
        break;
    }
    case RELU:
        value = above;
        *slope = CHOOSE(positive, one, zero);
        break;
    case PRELU:
        value = CHOOSE(positive, x, alpha * x);
        *slope = CHOOSE(positive, one, zero + alpha);
        break;
    case ELU:
        value = CHOOSE(positive, x, exponential_less_1(below));
        *slope = exponential(below, &power, &rest);
        break;
    default: /* REXP */
        value = exponential_less_1(above);
        *slope = CHOOSE(positive, exponential(above, &power, &rest), zero);
    }
    *slope = CHOOSE(number, *slope, x);
    return CHOOSE(number, value, x);
}

static inline __attribute__((always_inline)) void
activated(const float *x, const float *slope, int64_t count, int sigma, int64_t n, float alpha, float *out)
{
    for (int64_t i = 0; i < count; i += VL) {
        float last[3][VL] = {0}; /* where less than a vector is left */
        int64_t here = count - i < VL ? count - i : VL;
        const float *from = x + i, *by = slope ? slope + i : 0;
        if (here < VL) {
            from = memcpy(last[0], from, sizeof(float) * here);
            if (slope) by = memcpy(last[1], by, sizeof(float) * here);
        }
        vf steep, value = activation(*(const vf *)from, sigma, alpha, &steep);
        vf found = slope ? whole_power(value, n - 1) * (float)n * steep * *(const vf *)by : whole_power(value, n);
        if (here == VL)
            *(vf *)(out + i) = found;
        else {
            *(vf *)last[2] = found;
            memcpy(out + i, last[2], sizeof(float) * here);
        }
    }
}

#define SIGMA(name) case name: if (slope) activated(x, slope, count, name, n, alpha, out); else activated(x, 0, count, name, n, alpha, out); break;

/* sigma(x)^n, n >= 1, of so many values, or, if there is slope, the slope of that, the slope of x. alpha: of PReLU. */
void khnb_activated(const float *x, const float *slope, int64_t count, int sigma, int64_t n, float alpha, float *out)
{
    switch (sigma) { SIGMA(SIGMOID) SIGMA(TANH) SIGMA(RELU) SIGMA(PRELU) SIGMA(ELU) SIGMA(REXP) }
}
