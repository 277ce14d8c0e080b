// Streams, events, and whether the operations on them are ordered.
//
// Everything is done at once, in the order in which it is asked for. What a real device might do later, or at the same
// time, is found by clocks: each stream and the host know of how many operations on every stream they come after. An
// operation on memory that another stream used, which is not known to be over, is a race. Copies to the host fill their
// target with garbage until the host waited for them, and what is copied from pinned memory may not change meanwhile.

#pragma once

#include <ATen/ATen.h>
#include <c10/core/Stream.h>

#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace order {

using Key = std::pair<int, int64_t>;    // of a stream: its device, and its number
using Clock = std::map<Key, int64_t>;   // of each stream so many operations are over

struct Uses {
  Key home{0, 0}, written_on{0, 0};
  int64_t written = 0;
  Clock read;
  std::set<Key> noted;  // by record_stream
};

// No tensor that Python may know is held: to let go of it needs Python's lock, whose owner may wait for ours.
struct Copy {
  Key stream;
  int64_t number;
  char* host;
  at::Tensor bytes;
  bool to_host;
};

inline std::recursive_mutex mutex;
inline std::map<Key, Clock> streams;
inline Clock host;
inline std::list<Copy> copies;
inline std::vector<std::string> races;
inline thread_local std::map<int, int64_t> current;
inline int64_t last_stream = 0;

inline Key key_of(const c10::Stream& stream) { return {stream.device_index(), static_cast<int64_t>(stream.id())}; }
inline Key current_on(int device) { return {device, current[device]}; }

inline void merge(Clock& clock, const Clock& other) {
  for (const auto& [key, number] : other) clock[key] = std::max(clock[key], number);
}

inline void race(const std::string& what) {
  races.push_back(what);
  TORCH_CHECK(!std::getenv("STANDIN_STOPS"), what);  // to see where
}

inline bool over(const Clock& clock, const Key& stream, int64_t number) {
  auto found = clock.find(stream);
  return found != clock.end() && found->second >= number;
}

// The number of a new operation on a stream.
inline int64_t next(const Key& stream) {
  Clock& clock = streams[stream];
  merge(clock, host);
  return ++clock[stream];
}

inline void use(Uses& uses, const Key& stream, int64_t number, bool writes) {
  const Clock& clock = streams[stream];
  if (uses.written && !over(clock, uses.written_on, uses.written)) race("used before another stream has written it");
  if (!writes) {
    uses.read[stream] = number;
    return;
  }
  for (const auto& [reader, when] : uses.read)
    if (!over(clock, reader, when)) race("written while another stream reads it");
  uses.read.clear();
  uses.written_on = stream;
  uses.written = number;
}

// Whether memory may go to another tensor of the stream that it was allocated on.
inline void release(const Uses& uses) {
  Clock clock = streams[uses.home];
  merge(clock, host);
  Clock used = uses.read;
  if (uses.written) used[uses.written_on] = std::max(used[uses.written_on], uses.written);
  for (const auto& [stream, number] : used)
    if (stream != uses.home && !uses.noted.count(stream) && !over(clock, stream, number))
      race("freed while another stream uses it");
}

inline void begin(const Key& stream, int64_t number, const at::Tensor& host, bool to_host) {
  at::Tensor bytes = at::from_blob(host.data_ptr(), {static_cast<int64_t>(host.nbytes())}, at::kByte).clone();
  copies.push_back({stream, number, static_cast<char*>(host.data_ptr()), bytes, to_host});
  if (to_host) std::memset(host.data_ptr(), 0xCD, host.nbytes());
}

// Pinned memory that nobody holds any more is given to nobody else before its copies are over.
inline void forget(char* from, size_t bytes) {
  copies.remove_if([&](const Copy& copy) { return copy.host >= from && copy.host < from + bytes; });
}

inline void settle() {
  for (auto copy = copies.begin(); copy != copies.end();) {
    if (!over(host, copy->stream, copy->number)) {
      ++copy;
      continue;
    }
    if (copy->to_host) {
      std::memcpy(copy->host, copy->bytes.data_ptr(), copy->bytes.numel());
    } else if (std::memcmp(copy->host, copy->bytes.data_ptr(), copy->bytes.numel())) {
      race("pinned memory was written to before its copy was over");
    }
    copy = copies.erase(copy);
  }
}

// The host waits for what this clock tells.
inline void wait(const Clock& clock) {
  merge(host, clock);
  settle();
}

}  // namespace order
