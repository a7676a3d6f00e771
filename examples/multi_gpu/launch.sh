#!/usr/bin/env bash
# The paper's recipe, worked out for any number of GPUs. For Stable Diffusion: FLUX.2 and Wan want another beta and LoRA,
# docs/scaling.md tells how. On one machine with eight GPUs, DATA a folder or a data set of the hub:
#
#   MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 DATA=path/to/winners OUTPUT=sspo examples/multi_gpu/launch.sh
#
# On eight machines with eight each, on every one of them, RANK from 0 to 7, OUTPUT on a disk that all share:
#
#   MACHINES=8 RANK=0 ADDRESS=10.0.0.1 GPUS=8 MODEL=... DATA=... OUTPUT=... \
#     examples/multi_gpu/launch.sh
#
# What stands behind the command goes to the script, and overrides what is here: --mixed_precision no, for one, or
# --cache_latents where the winners fit the disk. The arithmetic, at MICRO=1, where pairs = processes x micro-batch x
# accumulation is the global batch, on which the results depend, and its layout is free:
#
#   GPUs in all            1      8     16     64
#   accumulation        2048    256    128     32      (the paper: 8 GPUs, micro-batch 1, accumulation 256)
#   rivals at once        16     16     16     16      (--rollout_batch_size, a multiple of the micro-batch)
#   rollouts an update   128     16      8      2      (on each GPU)
set -euo pipefail

: "${MODEL:?the base model: hub name or folder}" "${DATA:?the winners: folder or hub name}" "${OUTPUT:?where the results go}"
SCRIPT=${SCRIPT:-$(dirname "$0")/../../train_sspo_sd.py}
GPUS=${GPUS:-8}              # of one machine
MACHINES=${MACHINES:-1}
RANK=${RANK:-0}              # number of this machine
ADDRESS=${ADDRESS:-127.0.0.1} # of machine 0
PORT=${PORT:-29500}
MICRO=${MICRO:-1}            # pairs in a micro-batch of one GPU: as many as its memory takes
PAIRS=${PAIRS:-2048}         # the global batch
PRECISION=${PRECISION:-bf16} # fp16 on cards before Ampere, no for fp32

PROCESSES=$((GPUS * MACHINES))
ACCUMULATION=$((PAIRS / (PROCESSES * MICRO)))
if ((ACCUMULATION * PROCESSES * MICRO != PAIRS)); then
    echo "launch.sh: $PAIRS pairs cannot be dealt to $PROCESSES GPUs in micro-batches of $MICRO: change MICRO" >&2
    exit 2
fi

if ((MACHINES > 1)); then
    LAYOUT=(--config_file "$(dirname "$0")/several_machines.yaml"
        --num_machines "$MACHINES" --machine_rank "$RANK" --main_process_ip "$ADDRESS" --main_process_port "$PORT")
elif ((PROCESSES > 1)); then
    LAYOUT=(--config_file "$(dirname "$0")/one_machine.yaml" --main_process_port "$PORT")
else
    LAYOUT=(--num_machines 1 --mixed_precision no --dynamo_backend no)
fi

if [[ -e $DATA ]]; then WINNERS=(--train_data_dir "$DATA"); else WINNERS=(--dataset_name "$DATA"); fi

# After SIGTERM a run finishes its update and saves a checkpoint; the launcher's agent kills it after 30 seconds unless
# told otherwise, and an update of 2048 pairs may take longer (docs/scaling.md).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Under nohup the agent would handle SIGHUP all the same, and pass it on to the run.
if [[ $(trap -p HUP) == "trap -- ''"* ]]; then export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT}; fi

# Known of the paper: full fine-tuning, beta, N = --replay_steps, 7 iterations = 210 updates. Not published: the rate,
# here that of the nearest public recipes (Diffusion-DPO and SPIN-Diffusion); the warm-up, here a tenth of the run; the
# precision, here bf16; and the rivals' sampler, here the scripts' own.
exec accelerate launch "${LAYOUT[@]}" --num_processes "$PROCESSES" "$SCRIPT" \
    --pretrained_model_name_or_path "$MODEL" "${WINNERS[@]}" --output_dir "$OUTPUT" \
    --mixed_precision "$PRECISION" --gradient_checkpointing \
    --train_mode full --beta_dpo 2000 --reference random --replay_steps 30 --max_train_steps 210 \
    --learning_rate 2e-5 --lr_scheduler constant_with_warmup --lr_warmup_steps 20 \
    --train_batch_size "$MICRO" --gradient_accumulation_steps "$ACCUMULATION" \
    --checkpointing_steps 30 --checkpoints_total_limit 2 --resume_from_checkpoint latest "$@"
