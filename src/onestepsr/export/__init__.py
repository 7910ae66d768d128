"""Models as files of other engines and libraries: ONNX, OpenVINO, ncnn, torch.export and diffusers."""
