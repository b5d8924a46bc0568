/* judge: what liblbs makes of many files, for processors that are emulated and for sanitizers.
 *
 * Reads lines "NET IMAGES OUTPUT COUNT THREADS LAYOUT" from stdin, without spaces inside. For each a line "STATUS WORDS" goes
 * to stdout; where the network opens, COUNT images are run and the results written. Ends with 2 where a line is damaged.
 */
#include <lbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t elements(lbs_shape shape) { return (size_t)(shape.sizes[0] * shape.sizes[1] * shape.sizes[2]); }

/* Memory of just the size, so that a sanitizer sees what is read or written beside it. */
static int run(const lbs_network* network, const char* images, const char* output, int count, int threads, int layout) {
    lbs_shape in, out;
    int status = lbs_input(network, &in);
    if (status || (status = lbs_output(network, &out))) return status;
    const size_t image = elements(in) * (in.dtype == LBS_UINT8 ? 1 : sizeof(float));
    const size_t result = elements(out) * sizeof(float);
    void* x = malloc((size_t)count * image + !count);
    float* y = malloc((size_t)count * result + !count);
    FILE *from = fopen(images, "rb"), *to = fopen(output, "wb");
    if (!x || !y || !from || !to || fread(x, image, (size_t)count, from) != (size_t)count) exit(2);
    status = lbs_run(network, x, layout, count, threads, y);
    if (!status && fwrite(y, result, (size_t)count, to) != (size_t)count) exit(2);
    fclose(from);
    fclose(to);
    free(x);
    free(y);
    return status;
}

int main(void) {
    char net[1024], images[1024], output[1024];
    int count, threads, layout;
    while (scanf("%1023s %1023s %1023s %d %d %d", net, images, output, &count, &threads, &layout) == 6) {
        lbs_network* network = (lbs_network*)net; /* lbs_open sets it, whatever comes */
        int status = lbs_open(net, 1, &network);
        if (!status != !!network) return 2;
        if (!status) status = run(network, images, output, count, threads, layout);
        printf("%d %s\n", status, status ? lbs_error() : "");
        fflush(stdout);
        lbs_close(network);
    }
    return feof(stdin) ? 0 : 2;
}
