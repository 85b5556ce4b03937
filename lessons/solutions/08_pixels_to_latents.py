"""Answers of lesson 08."""

import torch

from lessons.exercises import Exercise, difference

# ------------------------------------------------------------------------------------------------------ psnr


def psnr(x, x_hat):
    mse = (x - x_hat).square().mean()
    return 10 * torch.log10(2**2 / mse)


def check_psnr(function) -> str | None:
    """Of two pictures that are off by different amounts. A plain number will do."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(2, 3, 4, 4, generator=generator)
    arguments = (x, x + noise * torch.tensor([0.1, 0.3]).reshape(2, 1, 1, 1))
    mistakes = {
        "takes the natural logarithm: torch.log10 has the base 10": natural_logarithm,
        "takes the root of the mean squared error: the formula has the mean square itself": rooted,
        "takes 1 for the largest squared error: pixels lie between -1 and 1, so it is 2 squared": peak_of_1,
        "takes 2 for the largest squared error: it is 2 squared": peak_not_squared,
        "adds up the squared errors: take their mean": summed,
        "has the fraction upside down, so that more error gives more decibels": upside_down,
        "leaves out the factor 10: a decibel is a tenth of a bel": without_10,
        "multiplies by 20: that belongs to the ratio of sizes, 10 to the ratio of squares": times_20,
        "gives one number for each picture: the mean goes over all of them": by_picture,
        "takes the mean of the differences without their squares: positive and negative ones cancel out": not_squared,
        "takes the mean absolute error: the formula squares the differences": absolute,
    }
    got = function(*arguments)
    got = torch.tensor(got) if isinstance(got, float) else got
    return difference(got, psnr(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _mse(x, x_hat):
    return (x - x_hat).square().mean()


def natural_logarithm(x, x_hat):
    return 10 * torch.log(4 / _mse(x, x_hat))


def rooted(x, x_hat):
    return 10 * torch.log10(4 / _mse(x, x_hat).sqrt())


def peak_of_1(x, x_hat):
    return 10 * torch.log10(1 / _mse(x, x_hat))


def peak_not_squared(x, x_hat):
    return 10 * torch.log10(2 / _mse(x, x_hat))


def summed(x, x_hat):
    return 10 * torch.log10(4 / (x - x_hat).square().sum())


def upside_down(x, x_hat):
    return 10 * torch.log10(_mse(x, x_hat) / 4)


def without_10(x, x_hat):
    return torch.log10(4 / _mse(x, x_hat))


def times_20(x, x_hat):
    return 20 * torch.log10(4 / _mse(x, x_hat))


def by_picture(x, x_hat):
    return 10 * torch.log10(4 / (x - x_hat).square().mean(dim=(1, 2, 3)))


def not_squared(x, x_hat):
    return 10 * torch.log10(4 / (x - x_hat).mean().abs())


def absolute(x, x_hat):
    return 10 * torch.log10(4 / (x - x_hat).abs().mean())


def number_psnr(function) -> str:
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large, small = (float(function(torch.zeros_like(noise), size * noise)) for size in (0.1, 0.01))
    return f"noise of size 0.1: {large:.1f} dB; of size 0.01: {small:.1f} dB"


# ------------------------------------------------------------------------------------------------------ sample_latent


def sample_latent(mean, logvar, eps):
    std = (0.5 * logvar).exp()
    return mean + std * eps


def check_sample_latent(function) -> str | None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar, eps = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    arguments = (mean, logvar, eps)
    mistakes = {
        "takes the variance for the standard deviation: halve logvar before the exponential": variance,
        "doubles logvar where it should halve it: std is the root of the variance": doubled,
        "multiplies by logvar itself: it is a logarithm, so take the exponential of its half": logvar_itself,
        "multiplies by half of logvar: it is a logarithm, take its exponential as well": without_exponential,
        "halves the variance instead of its logarithm: exp(logvar / 2), not exp(logvar) / 2": halved_late,
        "leaves out the mean: a sample lies around it": without_mean,
        "returns the mean: add std times eps": mean_alone,
        "adds std for every number alike: multiply it by eps, which is different everywhere": without_eps,
        "adds eps as it is: multiply it by std first": unscaled_eps,
        "multiplies the mean by std: that belongs to eps alone": mean_scaled,
    }
    return difference(function(*arguments), sample_latent(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def variance(mean, logvar, eps):
    return mean + logvar.exp() * eps


def doubled(mean, logvar, eps):
    return mean + (2 * logvar).exp() * eps


def logvar_itself(mean, logvar, eps):
    return mean + logvar * eps


def without_exponential(mean, logvar, eps):
    return mean + logvar / 2 * eps


def halved_late(mean, logvar, eps):
    return mean + logvar.exp() / 2 * eps


def without_mean(mean, logvar, eps):
    return (logvar / 2).exp() * eps


def mean_alone(mean, logvar, eps):
    return mean.clone()


def without_eps(mean, logvar, eps):
    return mean + (logvar / 2).exp()


def unscaled_eps(mean, logvar, eps):
    return mean + eps


def mean_scaled(mean, logvar, eps):
    return (mean + eps) * (logvar / 2).exp()


def root_of_logvar(mean, logvar, eps):
    return mean + logvar.sqrt() * eps


def number_sample_latent(function) -> str:
    shape = (1, 1, 100, 100)
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z = function(torch.full(shape, 2.0), torch.full(shape, 0.25).log(), eps)
    return f"10,000 samples of mean 2 and standard deviation 0.5 have {float(z.mean()):.2f} and {float(z.std()):.2f}"


# ------------------------------------------------------------------------------------------------------ scaling_factor


def scaling_factor(latents):
    sigma = latents.std()
    return 1 / sigma


def check_scaling_factor(function) -> str | None:
    """Of latents whose channels have means and sizes of their own, and whose pictures differ."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 6, 6, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    latents = latents * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1) + torch.tensor([2.0, -1.0, 3.0, 1.0]).reshape(4, 1, 1)
    mistakes = {
        "divides by the variance: multiplied by s it becomes s^2 as large, so take the root: 1 / latents.std()": over_variance,
        "gives sigma itself, and the latents would grow further: take 1 / sigma": sigma_itself,
        "gives a factor for each channel, shape [4]: one number for all of them": for_each_channel,
        "gives a factor for each picture, shape [3]: one number for all of them": for_each_picture,
        "takes the mean square for the variance: the mean of all the numbers is not zero here and has to be taken off first": without_the_mean,
        "averages over pictures that were measured one by one, which leaves out how they differ: take std over everything at once": by_picture_averaged,
        "divides the latents by sigma: what is asked for is the factor itself, 1 / sigma": scaled_latents,
    }
    return difference(function(latents), scaling_factor(latents), {sentence: slip(latents) for sentence, slip in mistakes.items()})


def over_variance(latents):
    return 1 / latents.var()


def sigma_itself(latents):
    return latents.std()


def for_each_channel(latents):
    return 1 / latents.std(dim=(0, 2, 3))


def for_each_picture(latents):
    return 1 / latents.std(dim=(1, 2, 3))


def without_the_mean(latents):
    return 1 / latents.square().mean().sqrt()


def by_picture_averaged(latents):
    return 1 / latents.std(dim=(1, 2, 3)).mean()


def scaled_latents(latents):
    return latents / latents.std()


def number_scaling_factor(function) -> str:
    latents = 5.49 * torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    factor = float(function(latents))
    return f"latents of size 5.49 get the factor {factor:.3f}; multiplied by it, their variance is {float((factor * latents).var()):.2f}"


EXERCISES = (
    Exercise(
        psnr,
        check_psnr,
        wrong=(
            (natural_logarithm, "natural logarithm"),
            (rooted, "takes the root"),
            (peak_of_1, "takes 1 for"),
            (peak_not_squared, "takes 2 for"),
            (summed, "adds up the squared errors"),
            (upside_down, "upside down"),
            (without_10, "leaves out the factor 10"),
            (times_20, "multiplies by 20"),
            (by_picture, "for each picture"),
            (not_squared, "cancel out"),
            (absolute, "mean absolute error"),
        ),
        number=number_psnr,
    ),
    Exercise(
        sample_latent,
        check_sample_latent,
        wrong=(
            (variance, "takes the variance"),
            (doubled, "doubles logvar"),
            (logvar_itself, "by logvar itself"),
            (without_exponential, "by half of logvar"),
            (halved_late, "halves the variance"),
            (without_mean, "leaves out the mean"),
            (mean_alone, "returns the mean"),
            (without_eps, "for every number alike"),
            (unscaled_eps, "adds eps as it is"),
            (mean_scaled, "multiplies the mean"),
            (root_of_logvar, "root of something negative"),
        ),
        number=number_sample_latent,
    ),
    Exercise(
        scaling_factor,
        check_scaling_factor,
        wrong=(
            (over_variance, "divides by the variance"),
            (sigma_itself, "sigma itself"),
            (for_each_channel, "for each channel"),
            (for_each_picture, "for each picture"),
            (without_the_mean, "the mean square"),
            (by_picture_averaged, "one by one"),
            (scaled_latents, "divides the latents"),
        ),
        number=number_scaling_factor,
    ),
)
