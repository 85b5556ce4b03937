"""Answers of lesson 15."""

import torch

from lessons.exercises import Exercise, difference


def with_prior(loss, subjects, weight):
    return loss[:subjects].mean() + weight * loss[subjects:].mean()


def check_with_prior(function) -> str | None:
    """Of three losses of the subject and five of the class, so that means and sums differ."""
    loss = torch.tensor([0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0])
    arguments = (loss, 3, 0.4)
    mistakes = {
        "forgets the weight, here 0.4: the class counts as much as the subject": unweighted(*arguments),
        "gives the weight to the subject; the prior is the part that is weighted": weighted_subject(*arguments),
        "takes the subject's loss alone: what stands from row 3 on is missing": subject_alone(*arguments),
        "adds the losses up instead of taking means, so that it grows with the batch": added(*arguments),
        "takes one mean over all 8 rows: each part has a mean of its own": one_mean(*arguments),
    }
    return difference(function(*arguments), with_prior(*arguments), mistakes)


def unweighted(loss, subjects, weight):
    return loss[:subjects].mean() + loss[subjects:].mean()


def weighted_subject(loss, subjects, weight):
    return weight * loss[:subjects].mean() + loss[subjects:].mean()


def subject_alone(loss, subjects, weight):
    return loss[:subjects].mean()


def added(loss, subjects, weight):
    return loss[:subjects].sum() + weight * loss[subjects:].sum()


def one_mean(loss, subjects, weight):
    return torch.cat([loss[:subjects], weight * loss[subjects:]]).mean()


EXERCISES = (
    Exercise(
        with_prior,
        check_with_prior,
        wrong=(
            (unweighted, "forgets the weight"),
            (weighted_subject, "gives the weight to the subject"),
            (subject_alone, "subject's loss alone"),
            (added, "adds the losses up"),
            (one_mean, "one mean over all"),
        ),
    ),
)
