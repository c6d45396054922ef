"""Short names for models that work together: Llama 2 Chat targets, EAGLE heads and draft models for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        name: The short name.
        hub_id: The repository on the Hugging Face hub.
        role: "target", "head" or "drafter". A head drafts for one target only.
        gigabytes: GPU memory of the weights with ``load``'s default settings, in GB.
        license: Name of the license.
        quantize: How ``load`` quantizes the model by default. "none" keeps the stored precision.
        drafter: For a target, the short name of the draft model that ``drafter="auto"`` selects.
        head: For a target, the short name of the EAGLE head that ``drafter="auto"`` prefers if it is on disk.
    """

    name: str
    hub_id: str
    role: str
    gigabytes: float
    license: str
    quantize: str = "none"
    drafter: str | None = None
    head: str | None = None


LLAMA_2 = "Llama 2 Community License"

KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "llama2-7b-chat",
            "mlx-community/Llama-2-7b-chat-4-bit",
            "target",
            4.0,
            LLAMA_2,
            "none",
            "amd-135m",
            "eagle-llama2-7b",
        ),
        KnownModel(
            "llama2-13b-chat",
            "NousResearch/Llama-2-13b-chat-hf",
            "target",
            7.3,
            LLAMA_2,
            "4",
            "amd-135m",
            "eagle-llama2-13b",
        ),
        KnownModel(
            "llama2-70b-chat",
            "NousResearch/Llama-2-70b-chat-hf",
            "target",
            38.8,
            LLAMA_2,
            "4",
            "amd-135m",
            "eagle-llama2-70b",
        ),
        KnownModel("eagle-llama2-7b", "yuhuili/EAGLE-llama2-chat-7B", "head", 0.5, "Apache 2.0"),
        KnownModel("eagle-llama2-13b", "yuhuili/EAGLE-llama2-chat-13B", "head", 0.7, "Apache 2.0"),
        KnownModel("eagle-llama2-70b", "yuhuili/EAGLE-llama2-chat-70B", "head", 2.0, "Apache 2.0"),
        KnownModel("amd-135m", "amd/AMD-Llama-135m", "drafter", 0.27, "Apache 2.0"),
        KnownModel("llama-160m", "JackFram/llama-160m", "drafter", 0.32, "Apache 2.0"),
        KnownModel("llama-68m-chat", "Felladrin/Llama-68M-Chat-v1", "drafter", 0.14, "Apache 2.0"),
    )
}
