"""How well optimizers train: loss after equal steps, at rates swept alike, over seeds.

    python -m benchmarks.optimizer_quality --problems digits,gpt --optimizers muon,m3 --seeds 3 --steps 300

A run is one problem, optimizer, rate and seed; each is a line of JSON in `--out`, and a run that is there is not made
again. All optimizers have the same number of rates, and the printed loss is that of the best of them by its mean over
seeds, ± the standard deviation over these; `edge` says that the best rate is the first or last one tried.
"""
