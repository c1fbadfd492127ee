// A bundle in C++17: runs its reference model on the golden input beside its sample, compares the raw outputs with the
// golden ones, does NMS, and prints the detections. Exit codes: 0 equal, 1 an error, 3 the outputs differ.
//
//   Debian 13, Ubuntu 24.10 or newer: apt-get install g++ libonnxruntime-dev nlohmann-json3-dev
//   g++ -std=c++17 -O2 detect.cpp -o detect -I/usr/include/onnxruntime -lonnxruntime
//   ./detect BUNDLE          (a bundle released with `sample: true`)
//
// For images of your own fill the input as deploy/image.py does: resize with antialias to fit, top left (or as the
// contract's image.fit says), the rest `pad_rgb`. An image library without antialias costs AP: benchmarks/resize.py measures how much.
#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>

#include "nms.hpp"
#include "npy.hpp"

namespace {

using headstart::read_npy;
using nlohmann::json;

constexpr float kBoxPx = 0.1f, kScore = 1e-3f;  // as deploy/parity.py allows the same arithmetic in another order

json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": it cannot be read; give a bundle's folder");
  return json::parse(file);
}

template <class T>
float difference(const T* found, const std::vector<T>& golden) {
  float largest = 0;
  for (std::size_t i = 0; i < golden.size(); ++i) {
    const float one = std::abs(static_cast<float>(found[i]) - static_cast<float>(golden[i]));
    if (std::isnan(one)) return one;
    largest = std::max(largest, one);
  }
  return largest;
}

int run(const std::string& bundle) {
  const json release = read_json(bundle + "/release.json");
  if (release.at("schema_version") != 2) throw std::runtime_error("release.json: schema_version 2 is wanted");
  if (release.at("sample").is_null()) throw std::runtime_error("the bundle has no sample; release it with sample: true");
  const json& model = release.at("models").at(0);
  const json& contract = model.at("contract");
  const json& tensors = release.at("sample").at("tensors");
  const std::string input_name = contract.at("input_name");
  const auto output_names = contract.at("output_names").get<std::vector<std::string>>();

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "headstart");
  Ort::Session session(env, (bundle + "/" + model.at("file").get<std::string>()).c_str(), Ort::SessionOptions());

  auto images = read_npy<std::uint8_t>(bundle + "/" + tensors.at(input_name).get<std::string>());
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value input = Ort::Value::CreateTensor<std::uint8_t>(memory, images.values.data(), images.values.size(),
                                                                  images.shape.data(), images.shape.size());
  const char* inputs[] = {input_name.c_str()};
  const char* outputs[] = {output_names.at(0).c_str(), output_names.at(1).c_str(), output_names.at(2).c_str()};
  const auto raw = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, 3);
  const auto* boxes = raw[0].GetTensorData<float>();
  const auto* scores = raw[1].GetTensorData<float>();
  const auto* labels = raw[2].GetTensorData<std::int64_t>();

  const auto golden_boxes = read_npy<float>(bundle + "/" + tensors.at(output_names[0]).get<std::string>());
  const auto golden_scores = read_npy<float>(bundle + "/" + tensors.at(output_names[1]).get<std::string>());
  const auto golden_labels = read_npy<std::int64_t>(bundle + "/" + tensors.at(output_names[2]).get<std::string>());
  const std::size_t count = golden_scores.values.size();
  if (raw[1].GetTensorTypeAndShapeInfo().GetElementCount() != count)
    throw std::runtime_error("the model gives another number of candidates than the golden outputs have");
  const float box = difference(boxes, golden_boxes.values), score = difference(scores, golden_scores.values);
  const float label = difference(labels, golden_labels.values);
  const bool equal = box <= kBoxPx && score <= kScore && label == 0;  // of NaN none is true
  std::printf("raw outputs: boxes within %g px, scores within %g, labels %s: %s\n", box, score,
              label == 0 ? "equal" : "differ", equal ? "equal" : "DIFFERENT");

  // Where the image lies in the input: boxes are clipped to it, and an axis at a time go back to the original's pixels.
  const auto content = release.at("sample").at("content").get<std::vector<float>>();
  const auto original = release.at("sample").at("original").get<std::vector<float>>();
  const auto start = release.at("sample").value("start", std::vector<float>{0, 0});  // absent in older bundles
  const float y = original.at(0) / content.at(0), x = original.at(1) / content.at(1);
  const headstart::Box inside = {start.at(1), start.at(0), start.at(1) + content.at(1), start.at(0) + content.at(0)};
  const headstart::Limits limits = {contract.at("score_threshold"), contract.at("nms_iou"), contract.at("max_detections"),
                                    contract.at("nms") == "host", contract.at("class_agnostic_nms")};
  for (const auto& one : headstart::detect(boxes, scores, labels, count, inside, limits))
    std::printf("%s %.6f %.3f %.3f %.3f %.3f\n", contract.at("classes").at(one.label).get<std::string>().c_str(),
                one.score, x * (one.box[0] - inside[0]), y * (one.box[1] - inside[1]), x * (one.box[2] - inside[0]),
                y * (one.box[3] - inside[1]));
  return equal ? 0 : 3;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 2) throw std::runtime_error("usage: detect BUNDLE");
    return run(arguments[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
