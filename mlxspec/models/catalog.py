"""Short names for models that work together: Llama 2 Chat targets and drafters with the same tokenizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        name: The short name.
        hub_id: The repository on the Hugging Face hub.
        role: "target" or "drafter".
        gigabytes: GPU memory of the weights with ``load``'s default settings, in GB.
        license: Name of the license.
        quantize: How ``load`` quantizes the model by default. "none" keeps the stored precision.
        drafter: For a target, the short name of the drafter that ``drafter="auto"`` selects.
    """

    name: str
    hub_id: str
    role: str
    gigabytes: float
    license: str
    quantize: str = "none"
    drafter: str | None = None


LLAMA_2 = "Llama 2 Community License"

KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel("llama2-7b-chat", "mlx-community/Llama-2-7b-chat-4-bit", "target", 4.0, LLAMA_2, drafter="amd-135m"),
        KnownModel("llama2-13b-chat", "NousResearch/Llama-2-13b-chat-hf", "target", 7.3, LLAMA_2, "4", "amd-135m"),
        KnownModel("llama2-70b-chat", "NousResearch/Llama-2-70b-chat-hf", "target", 38.8, LLAMA_2, "4", "amd-135m"),
        KnownModel("amd-135m", "amd/AMD-Llama-135m", "drafter", 0.27, "Apache 2.0"),
        KnownModel("llama-160m", "JackFram/llama-160m", "drafter", 0.32, "Apache 2.0"),
        KnownModel("llama-68m-chat", "Felladrin/Llama-68M-Chat-v1", "drafter", 0.14, "Apache 2.0"),
    )
}
