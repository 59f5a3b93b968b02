/* The two steps of the KH rule that plain tensor operations do slowly on a CPU: gathering unit-norm patches
   at random places, and finding the winner and the m-th most active neuron of every patch. */
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
