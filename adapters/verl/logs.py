"""What veRL's own metrics mean, for ``kl-plugins report``. Read in the sources of veRL 0.8 and 0.9."""

from kl_plugins.report.native import HostLogs, NativeMetric

LOGS = HostLogs(
    title="veRL",
    marks=("actor/", "critic/", "timing_s/", "training/global_step", "perf/", "response_length/", "global_seqlen/"),
    metrics=(
        NativeMetric("critic/score/mean", "reward", "is the mean score of a response, before any KL in the reward"),
        NativeMetric(
            "actor/kl_loss",
            "kl",
            "is the value of the estimator in actor.kl_loss_type (by default low_var_kl, which is k3 with a clamp), "
            "aggregated by loss_agg_mode, on the policy of each update. Beyond the clamp of low_var_kl the gradient "
            "is 0 although this number is large; as a loss, k3 has the gradient of the forward KL of each token, and "
            "kl (k1) has none in expectation",
        ),
        NativeMetric(
            "actor/reward_kl_penalty",
            "kl",
            "is the KL in the reward: the mean over responses of each response's mean of the estimator in "
            "algorithm.kl_penalty (by default kl, which is k1, and can be negative), with the log-probs at the start "
            "of the update",
        ),
        NativeMetric(
            "actor/ppo_kl",
            "other_kl",
            "is a mean of log old policy - log policy, between the policies before and in the update. It says nothing "
            "about the reference",
        ),
        NativeMetric(
            "rollout_corr/k3_kl",
            "other_kl",
            "is an estimate of the KL from the policy of the engine that sampled to that of the trainer, on the drawn "
            "tokens. It says nothing about the reference",
        ),
        NativeMetric("actor/kl_coef", "beta", "is the coefficient of the KL loss"),
        NativeMetric("actor/reward_kl_penalty_coeff", "beta", "is the coefficient of the KL in the reward"),
        NativeMetric("actor/entropy", "entropy", "is the mean entropy of the policy over tokens, nats"),
        NativeMetric("actor/grad_norm", "grad_norm", "is the norm of the gradient before clipping"),
    ),
)
