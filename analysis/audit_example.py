r"""A DDIM step with its log-density, as trainers of the DDPO kind have it, for `ctrl audit`; and the errors that such steps are written with.

    ctrl audit analysis/audit_example.py:ddim_step              # every verdict holds
    ctrl audit analysis/audit_example.py:mean_over_coordinates  # a planted one: FAIL, and which

Copy this file, put your trainer's step in the place of `ddim_step`, and your own times and schedule beside it. The audit brings the model:
call it as model(x, t), with the step's own t, for what PREDICTION says ("epsilon" where it is not given).
"""

from __future__ import annotations

from math import pi

import torch

ETA = 1.0
TIMES = [*range(981, 0, -20), 0]  # from noise to data: 50 steps, the last one to timestep 0, which stands for data here
KEPT = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)  # Stable Diffusion's alphas_cumprod


def schedule():
    """alphas_cumprod at TIMES (or a tuple, alpha and sigma there)."""
    return KEPT[TIMES]


def std_of(t, t_next, eta=ETA):
    kept, kept_next = KEPT[t], KEPT[t_next]
    return eta * ((1 - kept_next) / (1 - kept) * (1 - kept / kept_next)).sqrt()


def mean_of(x, eps, t, t_next, std):
    x0 = (x - (1 - KEPT[t]).sqrt() * eps) / KEPT[t].sqrt()
    return KEPT[t_next].sqrt() * x0 + (1 - KEPT[t_next] - std**2).sqrt() * eps


def normal(x_next, mean, std):
    """log N(x_next; mean, std^2), one number per coordinate."""
    return -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * torch.log(torch.tensor(2 * pi))


def noise_like(x, generator):
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def ddim_step(x, t, t_next, model, generator, x_next=None, eta=ETA):
    """x_next (n, ...) and its log_prob (n,): drawn, or scored where it is given."""
    std = std_of(t, t_next, eta)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def kl(x, t, t_next, model, reference, eta=ETA):
    """KL( model's step || reference's step ) in nats, (n,)."""
    std = std_of(t, t_next, eta)
    away = mean_of(x, model(x, t), t, t_next, std) - mean_of(x, reference(x, t), t, t_next, std)
    return (away**2 / (2 * std**2)).flatten(1).sum(1)


def half_noisy(x, t, t_next, model, generator, x_next=None):
    """Not an error: the same step at eta = 1/2."""
    return ddim_step(x, t, t_next, model, generator, x_next, eta=0.5)


half_noisy.kl = lambda *given: kl(*given, eta=0.5)  # what lies on NAME itself goes before what lies in the file


# ---------------------------------------------------------------------------------------------- planted errors


def mean_over_coordinates(x, t, t_next, model, generator, x_next=None):
    """As in DDPO's published code: the log-density's mean over coordinates, which makes of the ratio its d-th root."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).mean(1)


def no_normaliser(x, t, t_next, model, generator, x_next=None):
    """-|x_next - mean|^2/2 std^2 without its constant: no density (the ratio of one step does not notice)."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, (-0.5 * ((x_next - mean) / std) ** 2).flatten(1).sum(1)


def variance_for_std(x, t, t_next, model, generator, x_next=None):
    """A square root forgotten in log_prob: the variance where the std belongs."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std**2).flatten(1).sum(1)


def variance_for_noise(x, t, t_next, model, generator, x_next=None):
    """A square root forgotten in the noise, and log_prob of what is drawn: a good density, of another law."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std**2 * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std**2).flatten(1).sum(1)


def another_noise(x, t, t_next, model, generator, x_next=None):
    """log_prob of noise that was drawn a second time."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
        return x_next, normal(mean + std * noise_like(x, generator), mean, std).flatten(1).sum(1)
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def rounded_after_scoring(x, t, t_next, model, generator, x_next=None):
    """x_next goes to half precision after its log_prob was taken: ratios of a policy to itself are not 1."""
    x_next, log_prob = ddim_step(x, t, t_next, model, generator, x_next)
    return x_next.half().to(x.dtype), log_prob


def dropout_in_step(x, t, t_next, model, generator, x_next=None):
    """Dropout left on: the same x_next is scored with another mean than it was drawn with."""
    return ddim_step(x, t, t_next, lambda x, t: torch.nn.functional.dropout(model(x, t), 0.1), generator, x_next)


def attached(x, t, t_next, model, generator, x_next=None):
    """x_next is not held fixed in its own log_prob: the gradient of -|mean + std z - mean|^2 is zero."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = mean + std * noise_like(x, generator)
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def shared_noise(x, t, t_next, model, generator, x_next=None):
    """One noise for the whole batch."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = (mean + std * noise_like(x[:1], generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def batch_statistics(x, t, t_next, model, generator, x_next=None):
    """The prediction is centred over the batch: a row's log_prob depends on the others."""
    return ddim_step(x, t, t_next, lambda x, t: model(x, t) - 0.1 * model(x, t).mean(0), generator, x_next)


def noiseless_last(x, t, t_next, model, generator, x_next=None):
    """The last step adds no noise, as samplers do, and its log_prob is that of a step which does."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    if x_next is None:
        x_next = mean.detach() if t_next == TIMES[-1] else (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def clamped_last(x, t, t_next, model, generator, x_next=None):
    """The last step's std held above 0.2, so that its log_prob stays small: it leaves noise in the data."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, std)
    std = std.clamp_min(0.2) if t_next == TIMES[-1] else std
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def times_exchanged(x, t, t_next, model, generator, x_next=None):
    """x0_hat with the schedule of t_next in the place of t's."""
    std, eps = std_of(t, t_next), model(x, t)
    x0 = (x - (1 - KEPT[t_next]).sqrt() * eps) / KEPT[t_next].sqrt()
    mean = KEPT[t_next].sqrt() * x0 + (1 - KEPT[t_next] - std**2).sqrt() * eps
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def whole_direction(x, t, t_next, model, generator, x_next=None):
    """sqrt(1 - alphas_cumprod) without "- std^2": the deterministic mean with noise on top."""
    std = std_of(t, t_next)
    mean = mean_of(x, model(x, t), t, t_next, torch.zeros(()))
    if x_next is None:
        x_next = (mean + std * noise_like(x, generator)).detach()
    return x_next, normal(x_next, mean, std).flatten(1).sum(1)


def with_kl(wrong):
    """The faithful step with a kl of its own."""
    def step(x, t, t_next, model, generator, x_next=None):
        return ddim_step(x, t, t_next, model, generator, x_next)

    step.kl = wrong
    return step


kl_without_time_step = with_kl(  # |eps - eps_ref|^2/2, as if every step weighed the same
    lambda x, t, t_next, model, reference: 0.5 * (model(x, t) - reference(x, t)).square().flatten(1).sum(1))
kl_in_bits = with_kl(lambda *given: kl(*given) / torch.log(torch.tensor(2.0)))
kl_over_std = with_kl(lambda x, t, t_next, *models: kl(x, t, t_next, *models) * std_of(t, t_next))  # std for std^2
kl_mean_over_coordinates = with_kl(lambda x, *rest: kl(x, *rest) / x[0].numel())
kl_detached = with_kl(lambda *given: kl(*given).detach())
