"""PGD-3 adversarial training of ResNet-50 on ImageNet, linf 4/255, streamed from disk.

    python launch.py --config=configs/imagenet_resnet50_at.py --workdir=runs/imagenet_at

For many accelerators; the learning rate is for a batch of 512 (docs/scaling.md has the rule).
Images are scaled to 224 on the shorter side and cropped at the centre; training pads them by 16
pixels and crops at random. Published, for a similar recipe (Salman et al., arXiv 2007.08489):
64.0 % clean, 35.0 % under AutoAttack at 4/255 on RobustBench's 5,000 images.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:imagenet2012"
    config.test_split = "validation"
    config.image_size = 224
    config.streaming = True
    config.validation_size = 5000
    config.augmentation = {"crop_padding": 16, "flip": True}
    config.model = {"name": "resnet50"}
    config.dtype = "bfloat16"

    config.threat.eps = 4 / 255
    config.adversary.num_steps = 3
    config.adversary.relative_step_size = 1 / 2

    config.batch_size = 512
    config.duration = "90 epochs"
    config.optimizer = {"name": "sgd", "momentum": 0.9}
    config.learning_rate = 0.2
    config.schedule = {"name": "piecewise", "boundaries": (1 / 3, 2 / 3), "factor": 0.1}
    config.log_every = "100 steps"
    config.validate_every = "5 epochs"
    config.checkpoint_every = "1 epoch"

    config.evaluation.num_examples = 5000
    config.evaluation.batch_size = 256
    config.evaluation.jacobian_chunk = 1
    config.attacks = default.attack_grid(linf=(1 / 255, 2 / 255, 4 / 255), autoattack=("linf",))
    config.audit.num_examples = 100
    return config
