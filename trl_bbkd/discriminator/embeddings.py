"""Embeddings of models that are read from the student's checkpoint once more, beside a student that has grown since."""

import torch
from transformers import PreTrainedModel

from ..host.engines import whole_shape


@torch.no_grad()
def match_embeddings(model: PreTrainedModel, student: PreTrainedModel) -> None:
    """
    Give a model of the student's checkpoint as many embeddings as the student has; those of added tokens are the
    student's.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The discriminator's, the critic's or the KL reference's, as it was loaded.
        student ([`~transformers.PreTrainedModel`]):
            Without its PEFT wrapper.
    """
    loaded, wanted = (whole_shape(each.get_input_embeddings().weight)[0] for each in (model, student))
    if loaded == wanted:
        return
    model.resize_token_embeddings(wanted, mean_resizing=False)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        own, students = getattr(model, name)(), getattr(student, name)()
        if own is not None:
            own.weight[loaded:] = students.weight[loaded:].to(own.weight)
