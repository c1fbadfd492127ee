"""The config that `pipeline init` writes, before the data is filled in: the whole chain, every line explained."""

CONFIG = """\
# A small detector for your data: distilled from a larger one, checked against the same one without help, exported.
#   pipeline check $file      read it, wire it, say every problem
#   pipeline plan $file       what is done and what will run
#   pipeline run $file        do it; the same command continues after an interruption
# `pipeline stages` explains every setting. Change one, and only what depends on it runs again. For a first look at the
# whole chain: pipeline run $file --set stages.teacher.steps=50 --set stages.control.steps=50 --set stages.distilled.steps=50
# Sized for a CPU with random weights at the start: with a GPU, take a larger canvas, pretrained backbones, more steps.
jobs: $jobs                       # trainings at once, each with its share of the cores; 1 where they would share a GPU
stages:
  data:                       # every image is opened once; every defect is refused or reported
    uses: dataset
    source:
      $source
    size: [$height, $width]          # height, width in pixels: images keep their ratio and are padded; larger is slower
    # Some of them, in another order, or several as one: [cat, {vehicle: [car, truck]}]. All of them:
    # classes: $classes

  teacher:                    # large, accurate, never shipped
    uses: train
    detector:
      name: faster_rcnn
      backbone: tiny          # or resnet50, resnet101, mobilenet_v2: on a GPU, with backbone_weights
      backbone_norm: batch    # `frozen` with backbone_weights, `batch` when beginning with random weights
      trainable_layers: 5     # of the backbone; 3 with backbone_weights
      neck_channels: 64
      anchor_scale: 4         # the smallest anchor is 4 x stride 4 = 16 pixels of the canvas
      proposals_training: 256
      proposals: 128
      rois: 64
      roi_head: {hidden: 256, sampling_ratio: 1}
    # backbone_weights: resnet50.pth   # a torchvision classification checkpoint: the best single improvement there is
    # weights: teacher.safetensors     # or a detector you have; with steps: 0 it is only loaded
    steps: 1000
    batch_size: 8
    optimizer: {name: adamw, lr: 2e-3, weight_decay: 1e-2, warmup: 100, schedule: cosine, clip: 10}
    augment: &augment {flip: 0.5, shift: 8}   # no flip where left and right differ, as in text
    validate_every: 250

  control:                    # the student ($gflops GFLOPs an image) without help: what distillation has to beat
    uses: train
    detector: &student
      $student
    steps: &steps 1000
    batch_size: 8
    # Tune this rate for the control: a control trained badly makes any gain look good.
    optimizer: &recipe {name: adamw, lr: 7e-3, weight_decay: 1e-2, warmup: 100, schedule: cosine, clip: 10}
    augment: *augment
    validate_every: 250

  distilled:                  # the same student, images, steps and rate, and the teacher's help
    uses: distill
    student: *student
    steps: *steps
    batch_size: 8
    optimizer: *recipe
    augment: *augment
    validate_every: 250
    methods:                  # any number of them act together
      pkd: {name: pkd, weight: 4}
      head: {name: head, rois: 32, akd: 0.3, ckd: 0.3, normalise: true, warmup: 100, lr_scale: 0.1}

  student: {uses: prune, needs: {checkpoint: distilled}}    # drops the teacher's traces and proves it
  onnx: {uses: export, needs: {checkpoint: student}, score_threshold: 0.3}
  accuracy: {uses: validate}  # COCO AP of every model above, the ONNX file through ONNX Runtime included
  latency: {uses: benchmark}
  report:                     # one HTML page; a gate that fails ends the command with exit code 3
    gates: {max_ap_drop: 0.005}
    # Also: min_teacher_ap, min_gain_over_control, gain_interval_excludes_zero.
  bundle: {uses: release, name: my_detector, licence: unknown}   # sample: true puts one of your images into it
$target"""
