/* intel-ipsec-mb beside the kernels: built by the bench `gcm`, spoken to through its standard input and output.
 *
 * A line "seal SIZE BATCHES" or "open SIZE BATCHES" is answered with the nanoseconds of a packet: batches of 32 packets with
 * AES-128-GCM, a nonce and 8 bytes of AAD each, texts in buffers of their own, in place, tags written or compared. */
#include <intel-ipsec-mb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BATCH 32

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

int main(void) {
    static struct gcm_key_data key __attribute__((aligned(64)));
    static const unsigned char raw[16] = {7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
    struct gcm_context_data context;
    IMB_ARCH arch;
    IMB_MGR *manager = alloc_mb_mgr(0);
    if (!manager) return 1;
    init_mb_mgr_auto(manager, &arch);
    IMB_AES128_GCM_PRE(manager, raw, &key);
    static const char *names[] = {"none", "noaesni", "sse", "avx", "avx2", "avx512"};
    printf("%s %s\n", imb_get_version_str(), (unsigned)arch < 6 ? names[arch] : "?");
    fflush(stdout);

    char direction[8];
    size_t size;
    int batches;
    while (scanf("%7s %zu %d", direction, &size, &batches) == 3) {
        int open = !strcmp(direction, "open"), wrong = 0;
        unsigned char *text[BATCH], *sealed[BATCH], iv[BATCH][12] = {{0}}, aad[BATCH][8] = {{0}}, tag[BATCH][16], computed[16];
        for (int i = 0; i < BATCH; i++) {
            text[i] = malloc(size + 64);
            sealed[i] = malloc(size + 64);
            memset(text[i], 0x5a, size);
            iv[i][11] = aad[i][7] = (unsigned char)i;
            IMB_AES128_GCM_ENC(manager, &key, &context, sealed[i], text[i], size, iv[i], aad[i], 8, tag[i], 16);
        }
        double spent = 0;
        for (int batch = 0; batch < batches; batch++) {
            if (open)
                for (int i = 0; i < BATCH; i++) memcpy(text[i], sealed[i], size);
            double start = now();
            for (int i = 0; i < BATCH; i++) {
                if (open) {
                    IMB_AES128_GCM_DEC(manager, &key, &context, text[i], text[i], size, iv[i], aad[i], 8, computed, 16);
                    wrong |= memcmp(computed, tag[i], 16);
                } else {
                    IMB_AES128_GCM_ENC(manager, &key, &context, text[i], text[i], size, iv[i], aad[i], 8, tag[i], 16);
                }
            }
            spent += now() - start;
        }
        if (wrong) return 2;
        printf("%.3f\n", spent / batches / BATCH);
        fflush(stdout);
        for (int i = 0; i < BATCH; i++) free(text[i]), free(sealed[i]);
    }
    return 0;
}
