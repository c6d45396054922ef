"""Training of drafters: pretraining, distillation data from the target, and finetuning with a distillation loss."""
