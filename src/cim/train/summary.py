"""A run's log.json as curves and metrics for results/train."""

import pandas as pd

# Columns of Trainer's log, what they are called in print and in results, and how a line shows them.
COLUMNS = {
    "reward": ("reward", ".3f"), "score/grc": ("grc", ".3f"), "score/qir": ("qir", ".3f"), "kl": ("kl", ".4f"),
    "variety/words": ("words", ".1f"), "variety/distinct": ("distinct", ".2f"), "loss": ("loss", ".3f"),
}  # fmt: skip


def curves(log: pd.DataFrame) -> pd.DataFrame:
    """The training steps of a log: columns step, reward, grc, qir, kl, words, distinct, loss, of those logged."""
    names = {key: name for key, (name, _) in COLUMNS.items() if key in log}
    return log.dropna(subset=["loss"])[["step", *names]].rename(columns=names).reset_index(drop=True)


def run_metrics(log: pd.DataFrame, method: str, seed: int) -> dict:
    """Steps of a run, and means over its first and last ten logged steps, or fewer where these would overlap."""
    table = curves(log)
    metrics = {"method": method, "seed": seed, "steps": int(log["step"].max())}
    metrics["loss_last_10"] = table["loss"].tail(10).mean()
    if "reward" in table:
        rollouts = table.dropna(subset=["reward"])  # further updates on the same captions log no reward
        metrics["window"] = window = min(10, max(1, len(rollouts) // 2))
        for name in ("reward", "grc", "qir", "distinct", "words"):
            metrics[f"{name}_first_10"] = rollouts[name].head(window).mean()
            metrics[f"{name}_last_10"] = rollouts[name].tail(window).mean()
        metrics["kl_last_10"] = rollouts["kl"].tail(window).mean() if "kl" in rollouts else None
    return metrics
