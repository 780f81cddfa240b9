#!/bin/sh
# Makes everything in this folder; about 15 minutes on one core. From the root of the repository:
#   sh checkpoints/ablations/train.sh
set -e
here=checkpoints/ablations
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

fit() { # CONFIG NAME OPTIONS...
    config=$1 name=$2
    shift 2
    python -m dia_lightning fit --config "configs/$config.yaml" --trainer.logger=false \
        --trainer.default_root_dir="runs/ablations/$name" --trainer.callbacks.folder="$here/$name" \
        --trainer.max_steps=800 --trainer.val_check_interval=400 "$@"
    python $here/shrink.py "$here/$name"
    rm "$here/$name/costs.json"
}
critic() { # NAME OPTIONS...
    fit critic_tiny "$@" --model.layers=2
}
denoiser() { # NAME OPTIONS...
    fit ddpm_tiny "$@" --model.layers=4 --model.warmup_steps=100 --data.batch_size=32
}

critic critic_soft --model.objective=soft --model.lam=4
critic critic
critic critic_clean --model.objective=clean
denoiser denoiser_raw --model.normalise=false
denoiser denoiser
python $here/classifier.py $here/classifier
critic critic_classifier --model.reward=dia_lightning.rewards.SequenceClassifier \
    --model.reward.model=$here/classifier --model.reward.label=positive
critic critic_raw --model.normalise=false --model.denoiser=$here/denoiser_raw
critic critic_joint --data.n_texts=16384 --model.reward=dia_lightning.rewards.WeightedSum \
    --model.reward.name=sentiment_and_fluency --model.reward.weights='[1.0, 0.2]' --model.reward.rewards='[
        {"class_path": "dia_lightning.rewards.VaderSentiment"},
        {"class_path": "dia_lightning.rewards.Perplexity", "init_args": {"model": "checkpoints/tiny/lm"}}]'
