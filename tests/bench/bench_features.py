"""How much faster are features with eval.dtype=mixed, and how different?

python tests/bench/bench_features.py [--run figures/medium/checkpoints/ec_ec/seed0 ...] [--images 256] [--rounds 3]

Every depth of a trained teacher, on images of noise, one thread. Rounds of both kinds alternate; the ratio is that of
their medians. Without instructions for bfloat16 both are the same.
"""
import argparse
import statistics
import time

import torch

from jepa_nb.features import batch_features
from jepa_nb.frozen import feature_dtype, load_encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = [f'figures/medium/checkpoints/{r}/seed0' for r in ('ec_ec', 'fn_ln')]
    parser.add_argument('--run', nargs='*', default=runs)
    parser.add_argument('--images', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'run':44}{'float32':>12}{'mixed':>12}{'ratio':>8}{'difference':>12}")
    for run in args.run:
        encoder = load_encoder(run)
        low = feature_dtype(encoder, 'mixed') == 'bfloat16'
        images = torch.randint(0, 256, (args.images, 64, 64, 3), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(0))
        seconds, found = {False: [], True: []}, {}
        for _ in range(args.rounds+1): # the first warms up
            for kind in seconds:
                start = time.perf_counter()
                with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=kind and low):
                    found[kind] = batch_features(encoder, images, norm='both')
                seconds[kind].append(time.perf_counter()-start)
        full, half = (1000*statistics.median(seconds[k][1:])/args.images for k in (False, True))
        gap = float((found[True]-found[False]).norm()/found[False].norm())
        print(f'{run:44}{full:9.2f} ms{half:9.2f} ms{full/half:8.2f}{gap:12.4f}')


if __name__ == '__main__': main()
