"""What OpenRLHF's own metrics mean, for ``kl-plugins report``. Read in the sources of OpenRLHF 0.10 and 0.11."""

from kl_plugins.report.native import HostLogs, NativeMetric

LOGS = HostLogs(
    title="OpenRLHF",
    marks=("logprobs_diff", "actor_lr", "actor_grad_norm", "policy_loss", "return", "total_length", "timing/ppo_train"),
    metrics=(
        NativeMetric("reward", "reward", "is the mean reward of a response"),
        NativeMetric(
            "kl",
            "kl",
            "is the value of the estimator in --algo.kl.estimator: with --algo.kl.use_loss of the loss, on the policy "
            "of each update, otherwise the mean over responses of each response's mean, with the log-probs at the "
            "start of the update. k1, the default, can be negative, and as a loss its gradient is 0 in expectation; "
            "the gradient of k3 as a loss is that of the forward KL of each token. It is 0 where no reference is "
            "loaded (--algo.kl.init_coef 0)",
        ),
        NativeMetric(
            "ppo_kl",
            "other_kl",
            "is a mean of log old policy - log policy, between the policies before and in the update. It says nothing "
            "about the reference",
        ),
        NativeMetric("entropy_loss", "entropy", "is the mean entropy of the policy over tokens, nats"),
        NativeMetric("actor_grad_norm", "grad_norm", "is the norm of the gradient before clipping"),
    ),
)
