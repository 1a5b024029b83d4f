"""Hugging Face Trainer: hand over the optimizer with its number of steps; a callback may log what is zero."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import symopt


class Zeros(TrainerCallback):
    """Adds the zeros to whatever the Trainer logs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_log(self, args, state, control, logs, **_):
        logs.update({f"zeros/{name}": count for name, count in self.optimizer.zeros().items()})


def main(folder, steps=60, resume=False):
    """Constrain the feed-forward neurons of a tiny BERT; ``resume`` from the folder's last checkpoint."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **size))
    symopt.constrain(model, {"*.intermediate.dense.weight": symopt.GroupSparse("out", keep=0.5)})
    data = [{"input_ids": row, "labels": int(row[0] > 25)} for row in torch.randint(50, (64, 8))]
    opt = symopt.AdamW(model, lr=5e-3, total_steps=steps)
    args = TrainingArguments(folder, max_steps=steps, save_steps=20, logging_steps=20, report_to="none", use_cpu=True)
    trainer = Trainer(model, args, None, data, optimizers=(opt, None), callbacks=[Zeros(opt)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    print(symopt.report(main("out/hf").model))
