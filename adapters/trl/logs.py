"""What TRL's own metrics mean, for ``kl-plugins report``. Read in the sources of TRL 0.28, 1.0 and 1.16."""

from kl_plugins.report.native import HostLogs, NativeMetric

LOGS = HostLogs(
    title="TRL",
    marks=("frac_reward_zero_std", "completions/", "clip_ratio/", "num_tokens", "reward_std", "rewards/"),
    metrics=(
        NativeMetric("reward", "reward", "is the mean reward of a completion"),
        NativeMetric(
            "kl",
            "kl",
            "is the mean over tokens of k3 in GRPO (times the importance ratio of the policy loss under "
            "use_bias_correction_kl), and of k1 at the start of the update in RLOO. It is logged only if beta is not "
            "0. As a loss, k3 without that ratio has the gradient of the forward KL of each token",
        ),
        NativeMetric("entropy", "entropy", "is the mean entropy of the policy over tokens, nats"),
        NativeMetric("grad_norm", "grad_norm", "is the norm of the gradient before clipping"),
    ),
)
