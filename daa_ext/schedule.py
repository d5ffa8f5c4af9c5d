"""How strongly the anchor pulls at step t of T (paper, p. 6 and appendix A)."""


def gamma(step: int, total_steps: int, daa_k0: float) -> float:
    """gamma_t = min(1, k0 (1 - t/T)) with k0 = daa_k0 / T: the anchor's share of the blend.

    Args:
        step: t, optimizer steps done so far, 0 <= t < T.
        total_steps: T > 0, optimizer steps of the whole run.
        daa_k0: the setting `daa_k0` >= 0, in steps. 0 switches the anchor off.

    Returns:
        A share in [0, 1]. The cap matters only where T < daa_k0: 1 - gamma would turn
        negative there and the run would climb the domain loss.
    """
    return min(1.0, daa_k0 / total_steps * (1.0 - step / total_steps))


def is_capped(total_steps: int, daa_k0: float) -> bool:
    """Whether the first gamma hits the cap, that is T < daa_k0 (the rule supposes T >= daa_k0)."""
    return daa_k0 > total_steps


def total_pull(total_steps: int, daa_k0: float) -> float:
    """Sum of gamma_t over the run, in steps; (daa_k0/2)(1 + 1/T) where no step is capped."""
    return sum(gamma(t, total_steps, daa_k0) for t in range(total_steps))
