/* Runs a packed network on raw images:  run NET.lbs.safetensors IMAGES OUTPUT COUNT THREADS
 *
 *     LBS=$(python -c "import lbs_kernels; print(lbs_kernels.__path__[0])")
 *     cc run.c -I$LBS -L$LBS -llbs -Wl,-rpath,$LBS -o run
 */
#include <lbs.h>
#include <stdio.h>
#include <stdlib.h>

static size_t elements(lbs_shape shape) { return (size_t)(shape.sizes[0] * shape.sizes[1] * shape.sizes[2]); }

static int fail(const char* words) {
    fprintf(stderr, "%s\n", words);
    return 1;
}

int main(int argc, char** argv) {
    lbs_network* network;
    lbs_shape in, out;
    if (argc != 6) return fail("usage: run NET.lbs.safetensors IMAGES OUTPUT COUNT THREADS");
    if (lbs_open(argv[1], 1, &network) || lbs_input(network, &in) || lbs_output(network, &out)) return fail(lbs_error());

    const size_t count = strtoul(argv[4], NULL, 10), image = elements(in) * (in.dtype == LBS_UINT8 ? 1 : sizeof(float));
    void* images = calloc(count, image);
    float* output = calloc(count, elements(out) * sizeof(float));
    FILE *from = fopen(argv[2], "rb"), *to = fopen(argv[3], "wb");
    if (!images || !output || !from || !to) return fail("no memory, or a file that cannot be opened");
    if (fread(images, image, count, from) != count) return fail("the images end early");

    if (lbs_run(network, images, LBS_CHANNELS_FIRST, (int64_t)count, atoi(argv[5]), output)) return fail(lbs_error());
    if (fwrite(output, elements(out) * sizeof(float), count, to) != count || fclose(to)) return fail("the disk is full");

    fclose(from);
    free(images);
    free(output);
    lbs_close(network);
    return 0;
}
