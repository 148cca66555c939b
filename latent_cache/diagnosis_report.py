"""The figures of `stats` as a table, and what they warn of."""

from __future__ import annotations

from statistics import median
from typing import Any

from ssdd.engine.tables import aligned

DEAD = 0.1  # deviation of the signal, as a share of the median channel's
HEAVY = 3.0  # excess kurtosis; that of a Laplace distribution
OUTLIERS = 1e-5  # share beyond 6 deviations
WHITE = 0.8  # spectral flatness; a field whose neighbours correlate by 0.33 has it
SMALLEST_GRID = 4  # positions per side; below this a spectrum is meaningless
CORRELATED = 0.8


def warnings_of(result: dict[str, Any]) -> list[str]:
    """What is wrong with the latent, each with its remedy; [] if nothing is."""
    channels, posterior = result["channels"], result["posterior"]
    found = []
    typical = median(channels["signal_std"])
    dead = [c for c, std in enumerate(channels["signal_std"]) if std < DEAD * typical]
    if dead:
        found.append(
            f"dead channels {_list(dead)}: their deviation is below {DEAD:g} of the median channel's, yet normalising "
            "makes their noise as large as any signal: take a tokenizer with fewer channels, or train it longer"
        )
    if posterior:
        noisy = [c for c, snr in enumerate(posterior["snr"]) if snr < 1 and c not in dead]
        if noisy:
            found.append(
                f"channels {_list(noisy)}: the posterior's noise is above the signal: train the tokenizer with a lower "
                "KL weight (losses.kl), or build the cache with content=mean"
            )
    heavy = [
        c
        for c, (kurtosis, far) in enumerate(zip(channels["excess_kurtosis"], channels["beyond_6"], strict=True))
        if kurtosis > HEAVY or far > OUTLIERS
    ]
    if heavy:
        found.append(
            f"heavy tails in channels {_list(heavy)}: a generator spends its capacity on rare values, and deviations "
            "are set by them: look at the images with the largest values, raise the KL weight (losses.kl)"
        )
    if min(result["shape"][1:]) >= SMALLEST_GRID and (flatness := result["spectrum"]["flatness"]) > WHITE:
        found.append(
            f"near-white spectrum (flatness {flatness:.2f}): neighbours hardly correlate, which is hard to generate: "
            "regularise the tokenizer (scale equivariance, REPA), take fewer channels or a smaller stride"
        )
    worst = result["largest_correlation"]
    if abs(worst["r"]) > CORRELATED:
        first, second = worst["channels"]
        found.append(
            f"channels {first} and {second} correlate by {worst['r']:.2f}: they hold the same information twice: use "
            "a tokenizer with fewer channels, or raise the KL weight (losses.kl)"
        )
    return found


def table(result: dict[str, Any]) -> str:
    """A readable page."""
    channels, posterior = result["channels"], result["posterior"]
    shape = " x ".join(map(str, result["shape"]))
    columns = {
        "raw mean": [f"{value:.4g}" for value in channels["raw_mean"]],
        "raw std": [f"{value:.4g}" for value in channels["raw_std"]],
        "mean": [f"{value:.3f}" for value in channels["mean"]],
        "std": [f"{value:.3f}" for value in channels["std"]],
        "kurtosis-3": [f"{value:.2f}" for value in channels["excess_kurtosis"]],
        ">4 std": [f"{value:.1e}" for value in channels["beyond_4"]],
        ">6 std": [f"{value:.1e}" for value in channels["beyond_6"]],
        "largest": [f"{value:.1f}" for value in channels["largest"]],
    }
    if posterior:
        columns |= {
            "SNR": [f"{value:.3g}" for value in posterior["snr"]],
            "KL nats": [f"{value:.4g}" for value in posterior["kl_nats"]],
            "bits": [f"{value:.4g}" for value in posterior["bits"]],
        }
    columns = {"channel": [str(channel) for channel in range(result["shape"][0])]} | columns
    lines = [f"{result['samples']} latents of {result['split']}, {shape}, {result['content']}", "", _columns(columns)]
    worst, spectrum = result["largest_correlation"], result["spectrum"]
    if worst["channels"]:
        lines += ["", f"largest correlation of two channels: {worst['r']:.3f} ({_list(worst['channels'])})"]
    if posterior:
        lines.append(
            f"information: {posterior['bits_a_latent']:.5g} bits per latent (Gaussian channels, 0.5 log2(1 + SNR) per "
            f"number), KL {posterior['kl_nats_a_latent']:.5g} nats"
        )
    else:
        lines.append("information: a cache of means has no posterior noise to compare with; build with content=moments")
    lines.append("")
    lines.append(f"power by radial frequency (cycles per position); flatness {spectrum['flatness']:.3f}, white noise 1")
    power = {
        "frequency": [f"{value:.3f}" for value in spectrum["frequency"]],
        "share": [f"{value:.4f}" for value in spectrum["share"]],
        "over white": [f"{value:.3g}" for value in spectrum["density"]],
    }
    lines.append(_columns(power))
    lines += ["", *[f"warning: {warning}" for warning in result["warnings"]]] if result["warnings"] else []
    return "\n".join(lines)


def _columns(columns: dict[str, list[str]]) -> str:
    return aligned(list(columns), list(zip(*columns.values(), strict=True)))


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
