python3 -m openrlhf.cli.train_ppo_ray \
  --algo.advantage.estimator group_norm \
  --algo.kl.use_loss \
  --algo.kl.estimator k2 \
  --algo.kl.init_coef 1e-3 \
  --train.async_enable
