// Reads the arrays beside a bundle's sample: numpy's .npy, little endian, C order. The file is a magic word, the length of
// a header, the header (a Python dict as text), and the numbers.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace headstart {

template <class T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;
};

template <class T>
constexpr const char* npy_type() {
  if constexpr (std::is_same_v<T, std::uint8_t>) return "|u1";
  if constexpr (std::is_same_v<T, float>) return "<f4";
  if constexpr (std::is_same_v<T, std::int64_t>) return "<i8";
}

template <class T>
Array<T> read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char start[10];
  if (!file.read(start, sizeof start) || std::string(start, 6) != "\x93NUMPY" || start[6] != 1)
    throw std::runtime_error(path + ": no .npy file of version 1");
  std::string header(static_cast<unsigned char>(start[8]) + 256 * static_cast<unsigned char>(start[9]), ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (header.find(std::string("'descr': '") + npy_type<T>() + "'") == std::string::npos ||
      header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error(path + ": " + npy_type<T>() + " in C order is wanted, given " + header);
  Array<T> array;
  std::size_t count = 1;
  std::istringstream shape(header.substr(header.find('(') + 1, header.find(')') - header.find('(') - 1));
  for (std::string side; std::getline(shape, side, ',');) {
    if (side.find_first_not_of(' ') == std::string::npos) continue;
    array.shape.push_back(std::stoll(side));
    count *= static_cast<std::size_t>(array.shape.back());
  }
  array.values.resize(count);
  if (!file.read(reinterpret_cast<char*>(array.values.data()), static_cast<std::streamsize>(count * sizeof(T))))
    throw std::runtime_error(path + ": it ends before its numbers do");
  return array;
}

}  // namespace headstart
