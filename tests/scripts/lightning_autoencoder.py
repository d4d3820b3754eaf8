"""Fit an autoencoder of handwritten digits with the Lightning Trainer; resumes from `last.ckpt`."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class LitAutoEncoder(L.LightningModule):
    def __init__(self, hidden=24, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 4)
        )
        self.decoder = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 64))
        self.losses = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = nn.functional.mse_loss(self(x), x)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), x), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint):
        self.losses = list(checkpoint["losses"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("lightning"))
    parser.add_argument("--max-epochs", type=int, default=2)
    parser.add_argument("--save-every-step", action="store_true")
    args = parser.parse_args()

    L.seed_everything(7)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    train = DataLoader(TensorDataset(images[:1280]), batch_size=64)
    val = DataLoader(TensorDataset(images[1280:]), batch_size=256)
    model = LitAutoEncoder()
    callbacks = [ModelCheckpoint(dirpath=args.folder, save_last=True, monitor="val_loss")]
    if args.save_every_step:
        callbacks.append(
            ModelCheckpoint(
                dirpath=args.folder / "steps",
                filename="{step:05d}",
                auto_insert_metric_name=False,
                every_n_train_steps=1,
                save_top_k=-1,
            )
        )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=args.max_epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = args.folder / "last.ckpt"
    trainer.fit(model, train, val, ckpt_path=last if last.exists() else None)
    value = trainer.callback_metrics["val_loss"].item()
    (args.folder / "losses.json").write_text(json.dumps({"train": model.losses, "val": value}))
    print(f"validation loss {value:.4f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
