"""What the page takes for granted: packages that jaxnorm does not depend on."""

NEEDS = {
    "to-a-file-and-back": "flatbuffers",
    "tensorflow-savedmodel-jax2tf": "tensorflow",
    "onnx-home-to-pytorch-and-out-from-there": "onnxruntime",
}
