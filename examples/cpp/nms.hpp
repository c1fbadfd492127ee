// Candidates become detections, as deploy/postprocess.py has it: score threshold, clipping, class-wise NMS, the best so
// many. No dependency, so that it can be taken as it is; a test holds it against the Python on random candidates.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace headstart {

using Box = std::array<float, 4>;  // x1, y1, x2, y2

struct Detection {
  Box box;  // in pixels of the network's input
  float score;
  std::int64_t label;
};

struct Limits {
  float score_threshold;  // scores must exceed it
  float nms_iou;          // a box falls when its IoU with a better one of its class exceeds it
  std::size_t max_detections;
  bool nms;             // false where the graph did it, or none is needed
  bool class_agnostic;  // suppress across classes
};

inline bool overlaps(const Box& a, const Box& b, float iou) {
  const float width = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), 0.0f);
  const float height = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]), 0.0f);
  const float inter = width * height;
  const float both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter;
  return inter > iou * both;
}

// Detections of one image, best first. `content` is where the image lies in the network's input, as corners: boxes are
// clipped to it first, so that what hangs over the padding does not dilute an overlap.
inline std::vector<Detection> detect(const float* boxes, const float* scores, const std::int64_t* labels,
                                     std::size_t count, const Box& content, const Limits& limits) {
  std::vector<Detection> found;
  for (std::size_t i = 0; i < count; ++i) {
    if (!(scores[i] > limits.score_threshold)) continue;
    const float* box = boxes + 4 * i;
    const Box clipped = {std::clamp(box[0], content[0], content[2]), std::clamp(box[1], content[1], content[3]),
                         std::clamp(box[2], content[0], content[2]), std::clamp(box[3], content[1], content[3])};
    if (clipped[2] > clipped[0] && clipped[3] > clipped[1]) found.push_back({clipped, scores[i], labels[i]});
  }
  // Stable: equal scores keep the graph's order.
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  std::vector<Detection> kept;
  for (const Detection& one : found) {
    if (kept.size() == limits.max_detections) break;
    const bool beaten = limits.nms && std::any_of(kept.begin(), kept.end(), [&](const Detection& better) {
                          return (limits.class_agnostic || better.label == one.label) &&
                                 overlaps(better.box, one.box, limits.nms_iou);
                        });
    if (!beaten) kept.push_back(one);
  }
  return kept;
}

}  // namespace headstart
