#include "origin.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <vector>

namespace emulator {
namespace {

// A site is coded as flag | file << kLineBits | line; an instruction as its distance from this module's start, which
// leaves the flag clear, as a module is smaller than 2 GiB.
constexpr uint32_t kSiteFlag = 1u << 31;
constexpr int kLineBits = 18;
constexpr uint32_t kLineMask = (1u << kLineBits) - 1;

std::mutex files_mutex;
std::vector<const char*> files;  // names come from __builtin_FILE, so they live as long as the module

uint32_t file_number(const char* file) {
  thread_local const char* last_file = nullptr;
  thread_local uint32_t last_number = 0;
  if (file == last_file) return last_number;
  std::lock_guard<std::mutex> lock(files_mutex);
  uint32_t number = 0;
  while (number < files.size() && std::strcmp(files[number], file) != 0) ++number;
  if (number == files.size()) files.push_back(file);
  last_file = file;
  last_number = number;
  return number;
}

struct Module {
  uintptr_t base;
  std::string path;
};

const Module& this_module() {
  static const Module module = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&file_number), &info);
    return Module{reinterpret_cast<uintptr_t>(info.dli_fbase), info.dli_fname ? info.dli_fname : ""};
  }();
  return module;
}

std::string tidy_path(const std::string& path) { return std::filesystem::path(path).lexically_normal().string(); }

// The lines of an instruction, innermost first: the line itself, then those that it was inlined into.
std::vector<std::string> source_lines(uint32_t offset) {
  char command[4096];
  snprintf(command, sizeof command, "addr2line -i -e '%s' %#x 2>/dev/null", this_module().path.c_str(), offset);
  std::vector<std::string> lines;
  FILE* output = popen(command, "r");
  if (!output) return lines;
  char line[4096];
  while (fgets(line, sizeof line, output)) {
    std::string text(line, strcspn(line, "\n"));
    text = text.substr(0, text.find(" (discriminator"));
    if (text[0] != '?') lines.push_back(tidy_path(text));
  }
  pclose(output);
  return lines;
}

}  // namespace

Origin::Origin(Site site) : code_(kSiteFlag | file_number(site.file) << kLineBits | (site.line & kLineMask)) {}

Origin Origin::of_instruction(const void* address) {
  Origin origin;
  origin.code_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) - this_module().base);
  return origin;
}

std::string Origin::describe() const {
  if (code_ & kSiteFlag) {
    std::lock_guard<std::mutex> lock(files_mutex);
    return tidy_path(files[(code_ & ~kSiteFlag) >> kLineBits]) + ":" + std::to_string(code_ & kLineMask);
  }
  const std::vector<std::string> lines = source_lines(code_);
  if (lines.empty()) return "unknown line (is addr2line installed?)";
  std::string text = lines[0];
  constexpr size_t kShownCallers = 2;
  for (size_t i = 1; i < lines.size() && i <= kShownCallers; ++i) text += " in " + lines[i];
  return text;
}

}  // namespace emulator
