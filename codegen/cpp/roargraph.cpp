// A graph over keys that is learnt from queries: its build, walks through it, and its growth.
//
// Keys that one training query finds become neighbours (RoarGraph, Chen et al. 2024; RetrievalAttention, Liu et al. 2024).  Here every
// key that a query finds is joined to all others that it finds, not the best one only, and pruned by distances as the queries measure
// them: |S'(a - b)|, S S' the second moment of the training queries.  A walk goes by inner products.
//
// A node is a key's place behind the first one that is covered.  It has a row of `slots` numbers: the nodes that it leads to, then -1.
// Keys are read where the store has them, a token a row.
//
// Results are the same bits for any number of threads: work is cut by nodes, queries or graphs, every sum has one order, and what one
// node's choice depends on is complete before it is made, or made in the order of nodes.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "on_threads.h"
#include "vector.h"

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))

// Nodes [first, end) of one KV head.
struct KvcGraphPart {
  const char *rows;
  int64_t row_bytes, first, end;
};

// The graphs of H KV heads, `graphs` of them each: row (node * H + head) * graphs + graph has `slots` numbers and one norm.
struct KvcGraphs {
  const KvcGraphPart *parts;  // [heads][part_count]
  int64_t part_count, heads, dim, type, nodes;
  int64_t graphs, slots;
  int32_t *rows;
  int32_t *entries;  // [heads][graphs][entry_count]
  int64_t entry_count, threads;
  float *norms;   // squared, as the metric measures
  float *metric;  // [heads][graphs][dim][dim]: the training queries' second moment
  float *mean;    // [heads][graphs][dim], of the keys that the graph was learnt with
};

struct KvcGraphBuild {
  int64_t queries, neighbours, degree, links, joined, width, looked_at;
  const float *query;     // [heads][graphs][queries][dim]
  const int64_t *limits;  // [queries]: nodes from there on came later than the query
};

namespace {

enum KeyType : int64_t { kFloat, kBfloat16, kHalf };
constexpr int64_t kTileKeys = 256, kTileQueries = 64;  // of the exact neighbours: what is multiplied at once
constexpr int64_t kNodes = 64;                         // of the build: what a thread takes at once
constexpr int kRows = kRegisters == 32 ? 8 : 4;        // of a tile that are summed at once
constexpr double kRidge = 1e-4;                        // of the mean diagonal: directions that no query asked about count a little
constexpr int64_t kFar = 512;                          // bytes of a key that are asked for ahead: its first lines

struct Keys {
  const KvcGraphPart *parts;
  int64_t dim, type;

  const char *row(int64_t node) const {
    const KvcGraphPart *part = parts;
    while (node >= part->end) part++;
    return part->rows + (node - part->first) * part->row_bytes;
  }
};

KVC_INLINE float widen_half(uint16_t bits) {
  const uint32_t shifted = (uint32_t)(bits & 0x7fff) << 13;
  float size;
  std::memcpy(&size, &shifted, sizeof size);
  size *= 0x1p112f;  // the exponents' biases differ by so much
  return bits & 0x8000 ? -size : size;
}
KVC_INLINE Floats widen_halves(Bits low) {  // 16 numbers in the low halves
  const Floats size = (Floats)((low & 0x7fffu) << 13) * 0x1p112f;
  return (Floats)((Bits)size | ((low & 0x8000u) << 16));
}

inline float number_at(const char *row, int64_t d, int64_t type) {
  if (type == kFloat) return ((const float *)row)[d];
  const uint16_t bits = ((const uint16_t *)row)[d];
  return type == kHalf ? widen_half(bits) : widen(Bfloat16{bits});
}
inline void widen_row(const char *row, const Keys &keys, float *to) {
  for (int64_t d = 0; d < keys.dim; d++) to[d] = number_at(row, d, keys.type);
}

// A vector that keys are multiplied with.  Where they have 2 bytes a number, 32 numbers are 16 even and 16 odd ones.
struct Query {
  std::vector<float> numbers;

  void set(const float *from, const Keys &keys) {
    numbers.resize((keys.dim + 31) / 32 * 32);
    for (int64_t d = 0; d < keys.dim; d++) numbers[place(d, keys.type)] = from[d];
  }
  static int64_t place(int64_t d, int64_t type) { return type == kFloat ? d : d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }
};

template <int64_t Type>
KVC_INLINE float dot_as(const float *query, const char *row, int64_t dim) {
  Floats sum = {}, other = {};
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    if constexpr (Type == kFloat) {
      sum = sum + load(query + d) * load((const float *)row + d);
      other = other + load(query + d + 16) * load((const float *)row + d + 16);
    } else {
      const Bits pairs = load_bits(row + d * 2);
      sum = sum + load(query + d) * (Type == kHalf ? widen_halves(pairs & 0xffffu) : even(pairs));
      other = other + load(query + d + 16) * (Type == kHalf ? widen_halves(pairs >> 16) : odd(pairs));
    }
  }
  float total = sum_lanes(sum + other);
  for (; d < dim; d++) total += query[Query::place(d, Type)] * number_at(row, d, Type);
  return total;
}
// Not a number counts as the worst there is: an order needs numbers.
inline float dot(const std::vector<float> &query, const char *row, const Keys &keys) {
  const float *from = query.data();
  const float product = keys.type == kFloat  ? dot_as<kFloat>(from, row, keys.dim)
                        : keys.type == kHalf ? dot_as<kHalf>(from, row, keys.dim)
                                             : dot_as<kBfloat16>(from, row, keys.dim);
  return product == product ? product : -kInfinity;
}

// Calls work(node, thread) for all nodes.
template <class F>
void each_node(int64_t nodes, int64_t threads, const F &work) {
  each_on_threads((nodes + kNodes - 1) / kNodes, threads, [&](int64_t block, int64_t thread) {
    for (int64_t node = block * kNodes; node < std::min(nodes, (block + 1) * kNodes); node++) work(node, thread);
  });
}

// A node and how good it is: larger scores come first, of equal ones the earlier node.
struct Near {
  float score;
  int32_t node;
  bool operator<(const Near &other) const { return score != other.score ? score > other.score : node < other.node; }
};

void keep_best(std::vector<Near> &nodes, size_t most) {
  if (nodes.size() <= most) return;
  std::nth_element(nodes.begin(), nodes.begin() + most, nodes.end());
  nodes.resize(most);
}

// The k largest of what is offered.
struct Largest {
  std::vector<Near> kept;
  float least = -kInfinity;

  void offer(float score, int32_t node, size_t k) {
    kept.push_back({score, node});
    if (kept.size() < 2 * k) return;
    keep_best(kept, k);
    least = std::max_element(kept.begin(), kept.end())->score;
  }
};

// tile[m][t] = query m . key t, summed in the order of the dimensions.
KVC_INLINE void multiply(const float *queries, const float *packed, int64_t dim, float *tile) {
  for (int64_t t = 0; t < kTileKeys; t += 16) {
    Floats sum[kRows];
    for (int m = 0; m < kRows; m++) sum[m] = Floats{};
    for (int64_t d = 0; d < dim; d++) {
      const Floats numbers = load(packed + t * dim + d * 16);
      for (int m = 0; m < kRows; m++) sum[m] = sum[m] + queries[m * dim + d] * numbers;
    }
    for (int m = 0; m < kRows; m++) store(tile + m * kTileKeys + t, sum[m]);
  }
}

// Of each query the k nodes before its limit with the largest products: [queries][k], best first, -1 where there are fewer.
std::vector<int32_t> find_nearest(const Keys &keys, const float *queries, const int64_t *limits, int64_t count, int64_t k,
                                  int64_t threads) {
  const int64_t dim = keys.dim;
  std::vector<int32_t> nearest(count * k, -1);
  each_on_threads((count + kTileQueries - 1) / kTileQueries, threads, [&](int64_t block, int64_t) {
    const int64_t first = block * kTileQueries, rows = std::min(kTileQueries, count - first);
    const int64_t last = *std::max_element(limits + first, limits + first + rows);
    std::vector<Largest> best(rows);
    std::vector<float> packed(kTileKeys * dim), tile(kRows * kTileKeys), padded(kTileQueries * dim), key(dim);
    std::copy(queries + first * dim, queries + (first + rows) * dim, padded.begin());
    for (int64_t at = 0; at < last; at += kTileKeys) {
      const int64_t here = std::min(kTileKeys, last - at);
      for (int64_t t = 0; t < here; t++) {
        widen_row(keys.row(at + t), keys, key.data());
        for (int64_t d = 0; d < dim; d++) packed[t / 16 * 16 * dim + d * 16 + t % 16] = key[d];
      }
      for (int64_t q = 0; q < rows; q += kRows) {
        multiply(padded.data() + q * dim, packed.data(), dim, tile.data());
        for (int64_t m = 0; m < std::min<int64_t>(kRows, rows - q); m++) {
          Largest &kept = best[q + m];
          const int64_t seen = std::min(here, limits[first + q + m] - at);
          for (int64_t t = 0; t < seen; t++)
            if (tile[m * kTileKeys + t] > kept.least) kept.offer(tile[m * kTileKeys + t], at + t, k);
        }
      }
    }
    for (int64_t q = 0; q < rows; q++) {
      std::vector<Near> &kept = best[q].kept;
      std::sort(kept.begin(), kept.end());
      const int64_t found = std::min<int64_t>(k, kept.size());
      for (int64_t i = 0; i < found; i++) nearest[(first + q) * k + i] = kept[i].node;
    }
  });
  return nearest;
}

// Keys as the training queries measure distances between them, in bfloat16; while a graph is built.
struct Points {
  std::vector<uint16_t> numbers;
  std::vector<float> norms;  // squared
  KvcGraphPart part;
  Keys keys;

  // Writes metric and mean.
  Points(const Keys &from, int64_t nodes, const float *queries, int64_t count, int64_t threads, float *metric, float *mean)
      : numbers(nodes * from.dim), norms(nodes) {
    const int64_t dim = from.dim;
    const std::vector<float> factor = factor_of_moment(queries, count, dim, threads, metric);
    find_mean(from, nodes, mean);
    part = {(const char *)numbers.data(), dim * 2, 0, nodes}, keys = {&part, dim, kBfloat16};
    each_node(nodes, threads, [&](int64_t node, int64_t) {
      static thread_local std::vector<float> key, point;
      key.resize(dim), point.assign(dim, 0);
      widen_row(from.row(node), from, key.data());
      for (int64_t i = 0; i < dim; i++) {
        const float centred = key[i] - mean[i], *row = factor.data() + i * dim;
        for (int64_t j = 0; j <= i; j++) point[j] += centred * row[j];
      }
      float sum = 0;
      for (int64_t d = 0; d < dim; d++) {
        Bfloat16 rounded;
        narrow(point[d], &rounded);
        numbers[node * dim + d] = rounded.bits;
        sum += widen(rounded) * widen(rounded);
      }
      norms[node] = sum == sum ? sum : kInfinity;
    });
  }
  std::vector<float> query(int64_t node) const {
    static thread_local std::vector<float> key;
    key.resize(keys.dim);
    widen_row(keys.row(node), keys, key.data());
    Query query;
    query.set(key.data(), keys);
    return query.numbers;
  }
  // Of the node that `query` was made of: the squared distance to another one, less than zero.
  float nearness(const std::vector<float> &query, int64_t node, int64_t other) const {
    return 2 * dot(query, keys.row(other), keys) - norms[other] - norms[node];
  }

 private:
  static void find_mean(const Keys &from, int64_t nodes, float *mean) {
    std::vector<double> sum(from.dim);
    for (int64_t node = 0; node < nodes; node++) {
      const char *row = from.row(node);
      for (int64_t d = 0; d < from.dim; d++) sum[d] += number_at(row, d, from.type);
    }
    for (int64_t d = 0; d < from.dim; d++) mean[d] = sum[d] / std::max<int64_t>(1, nodes);
  }
  // Cholesky's factor, a lower triangle, of the queries' second moment.
  static std::vector<float> factor_of_moment(const float *queries, int64_t count, int64_t dim, int64_t threads, float *metric) {
    std::vector<double> moment(dim * dim);
    each_on_threads(dim, threads, [&](int64_t i, int64_t) {
      double *row = moment.data() + i * dim;
      for (int64_t q = 0; q < count; q++) {
        const float *query = queries + q * dim;
        for (int64_t j = 0; j <= i; j++) row[j] += (double)query[i] * query[j];
      }
    });
    double trace = 0;
    for (int64_t i = 0; i < dim; i++) trace += moment[i * dim + i];
    const double ridge = trace > 0 && std::isfinite(trace) ? kRidge * trace / dim : 1;
    for (int64_t i = 0; i < dim; i++)
      for (int64_t j = 0; j <= i; j++) metric[i * dim + j] = metric[j * dim + i] = moment[i * dim + j] + (i == j ? ridge : 0);
    std::vector<float> factor(dim * dim);
    for (int64_t j = 0; j < dim; j++) {
      double diagonal = moment[j * dim + j] + ridge;
      for (int64_t l = 0; l < j; l++) diagonal -= moment[j * dim + l] * moment[j * dim + l];
      diagonal = std::sqrt(diagonal > ridge / 2 ? diagonal : ridge / 2);
      moment[j * dim + j] = diagonal, factor[j * dim + j] = diagonal;
      for (int64_t i = j + 1; i < dim; i++) {
        double sum = moment[i * dim + j];
        for (int64_t l = 0; l < j; l++) sum -= moment[i * dim + l] * moment[j * dim + l];
        moment[i * dim + j] = sum / diagonal, factor[i * dim + j] = sum / diagonal;
      }
    }
    return factor;
  }
};

struct Graph {
  int32_t *rows;
  int64_t stride, slots;

  Graph(const KvcGraphs &of, int64_t head, int64_t graph)
      : rows(of.rows + (head * of.graphs + graph) * of.slots), stride(of.heads * of.graphs * of.slots), slots(of.slots) {}
  int32_t *row(int64_t node) const { return rows + node * stride; }
  int64_t degree(int64_t node) const {
    const int32_t *links = row(node);
    int64_t count = 0;
    while (count < slots && links[count] >= 0) count++;
    return count;
  }
  bool has(int64_t node, int32_t other) const {
    const int32_t *links = row(node);
    return std::find(links, links + degree(node), other) != links + degree(node);
  }
  // False where `node` leads to `most` others already.
  bool add(int64_t node, int32_t other, int64_t most) const {
    const int64_t at = degree(node);
    if (at >= most) return false;
    row(node)[at] = other;
    return true;
  }
  void set(int64_t node, const std::vector<int32_t> &links) const {
    std::fill(std::copy(links.begin(), links.end(), row(node)), row(node) + slots, -1);
  }
};

// A walk's memory: of one thread, for one walk after another.
struct Walker {
  struct Place {
    float score;
    int32_t node;
    bool open;
  };
  std::vector<Place> beam;  // the best nodes so far, best first
  int64_t scanned = 0, hops = 0;

  void begin(int64_t nodes) {
    if ((int64_t)seen.size() < nodes) seen.resize(nodes);
    if (!++turn) std::fill(seen.begin(), seen.end(), 0), turn = 1;
    beam.clear();
    scanned = hops = 0;
  }
  bool is_new(int32_t node) {
    const bool first = seen[node] != turn;
    seen[node] = turn;
    return first;
  }
  // Fills the beam with the nodes of largest score(node, row): starts at the entries, goes on from the best node that it has not gone on
  // from, until `width` nodes are done.
  template <class Score>
  void walk(const Graph &graph, const Keys &keys, const Score &score, const int32_t *entries, int64_t entry_count, int64_t nodes,
            size_t width) {
    begin(nodes);
    look_at(keys, score, entries, entry_count, width);
    for (size_t next = 0; next < beam.size();) {
      if (!beam[next].open) {
        next++;
        continue;
      }
      beam[next].open = false;
      hops++;
      next = std::min(next + 1, look_at(keys, score, graph.row(beam[next].node), graph.slots, width));
    }
  }

 private:
  std::vector<uint32_t> seen;  // the turn that saw a node last
  uint32_t turn = 0;
  std::vector<int32_t> fresh;

  // Scores nodes that are new; returns the best place that one of them took.
  template <class Score>
  size_t look_at(const Keys &keys, const Score &score, const int32_t *nodes, int64_t count, size_t width) {
    fresh.clear();
    for (int64_t i = 0; i < count && nodes[i] >= 0; i++)
      if (is_new(nodes[i])) {
        fresh.push_back(nodes[i]);
        const char *row = keys.row(nodes[i]);
        for (int64_t byte = 0; byte < kFar; byte += 64) __builtin_prefetch(row + byte);
      }
    scanned += fresh.size();
    size_t best = beam.size();
    for (const int32_t node : fresh) best = std::min(best, put({score(node, keys.row(node)), node}, width));
    return best;
  }
  size_t put(const Near &near, size_t width) {
    const auto worse = [](const Near &a, const Place &b) { return a < Near{b.score, b.node}; };
    if (beam.size() == width) {
      if (!worse(near, beam.back())) return width;
      beam.pop_back();
    }
    const auto at = std::upper_bound(beam.begin(), beam.end(), near, worse);
    return beam.insert(at, {near.score, near.node, true}) - beam.begin();
  }
};

// Of candidates the nearest, without those that lie nearer to a chosen one than to the node itself (Arya and Mount 1993).
struct Pruner {
  std::vector<int32_t> chosen;
  std::vector<Near> sorted;

  // near(node), between(place, node): the squared distance to the node itself and to a chosen one, less than zero.  keep(place, node): it
  // is chosen.
  template <class ToCentre, class Between, class Keep>
  void choose(const std::vector<int32_t> &candidates, size_t most, size_t looked_at, const ToCentre &near, const Between &between,
              const Keep &keep) {
    sorted.clear(), chosen.clear();
    for (const int32_t node : candidates) {
      const float score = near(node);
      sorted.push_back({score == score ? score : -kInfinity, node});
    }
    keep_best(sorted, looked_at);
    std::sort(sorted.begin(), sorted.end());
    for (const Near &next : sorted) {
      if (chosen.size() == most) return;
      bool hidden = false;
      for (size_t i = 0; i < chosen.size() && !hidden; i++) hidden = between(i, next.node) > next.score;
      if (hidden) continue;
      keep(chosen.size(), next.node);
      chosen.push_back(next.node);
    }
  }
};

// A thread's share of a build.
struct Worker {
  Walker walker;
  Pruner pruner;
  std::vector<std::vector<float>> kept;
  std::vector<int32_t> candidates;
  std::vector<float> key;
  Query query;

  const std::vector<int32_t> &choose(const Points &points, int64_t node, size_t most, size_t looked_at) {
    const std::vector<float> centre = points.query(node);
    kept.resize(most);
    pruner.choose(
        candidates, most, looked_at, [&](int32_t other) { return points.nearness(centre, node, other); },
        [&](size_t place, int32_t other) { return points.nearness(kept[place], pruner.chosen[place], other); },
        [&](size_t place, int32_t other) { kept[place] = points.query(other); });
    return pruner.chosen;
  }
};

// Which queries find a node: those of node n are list[begin[n]] up to begin[n + 1].
struct Finders {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;

  Finders(const std::vector<int32_t> &nearest, int64_t k, int64_t nodes) : begin(nodes + 1) {
    for (const int32_t node : nearest)
      if (node >= 0) begin[node + 1]++;
    for (int64_t node = 0; node < nodes; node++) begin[node + 1] += begin[node];
    list.resize(begin[nodes]);
    std::vector<int64_t> at(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < nearest.size(); i++)
      if (nearest[i] >= 0) list[at[nearest[i]]++] = i / k;
  }
  int64_t count(int64_t node) const { return begin[node + 1] - begin[node]; }
};

class Builder {
 public:
  Builder(const KvcGraphs &graphs, const KvcGraphBuild &build, int64_t head, int64_t number)
      : build(build),
        nodes(graphs.nodes),
        threads(graphs.threads),
        keys{graphs.parts + head * graphs.part_count, graphs.dim, graphs.type},
        graph(graphs, head, number),
        entries(graphs.entries + (head * graphs.graphs + number) * graphs.entry_count),
        entry_count(graphs.entry_count),
        queries(build.query + (head * graphs.graphs + number) * build.queries * graphs.dim),
        points(keys, nodes, queries, build.queries, threads, graphs.metric + (head * graphs.graphs + number) * graphs.dim * graphs.dim,
               graphs.mean + (head * graphs.graphs + number) * graphs.dim),
        workers(threads) {
    for (int64_t node = 0; node < nodes; node++) graphs.norms[(node * graphs.heads + head) * graphs.graphs + number] = points.norms[node];
  }

  void run() {
    {
      const std::vector<int32_t> nearest = find_nearest(keys, queries, build.limits, build.queries, build.neighbours, threads);
      const Finders finders(nearest, build.neighbours, nodes);
      choose_entries(finders);
      project(nearest, finders);
    }
    lead_back();
    join();
    reach_all();
  }

 private:
  const KvcGraphBuild &build;
  const int64_t nodes, threads;
  const Keys keys;
  const Graph graph;
  int32_t *const entries;
  const int64_t entry_count;
  const float *const queries;
  const Points points;
  std::vector<Worker> workers;

  // The key nearest to the mean of all, and those that most queries find.
  void choose_entries(const Finders &finders) {
    std::vector<Near> hit;
    Near medoid = {-kInfinity, 0};
    for (int64_t node = 0; node < nodes; node++) {
      hit.push_back({(float)finders.count(node), (int32_t)node});
      medoid = std::min(medoid, Near{-points.norms[node], (int32_t)node});  // points are centred
    }
    std::sort(hit.begin(), hit.end());
    std::fill(entries, entries + entry_count, -1);
    entries[0] = medoid.node;
    int64_t at = 1;
    for (int64_t i = 0; i < nodes && at < entry_count; i++)
      if (hit[i].node != medoid.node) entries[at++] = hit[i].node;
  }

  // A node leads to what its finders find beside it.
  void project(const std::vector<int32_t> &nearest, const Finders &finders) {
    const int64_t k = build.neighbours;
    each_node(nodes, threads, [&](int64_t node, int64_t thread) {
      Worker &worker = workers[thread];
      worker.walker.begin(nodes);
      worker.walker.is_new(node);
      worker.candidates.clear();
      for (int64_t i = finders.begin[node]; i < finders.begin[node + 1]; i++) {
        const int32_t *found = nearest.data() + finders.list[i] * k;
        for (int64_t j = 0; j < k && found[j] >= 0; j++)
          if (worker.walker.is_new(found[j])) worker.candidates.push_back(found[j]);
      }
      graph.set(node, worker.choose(points, node, build.degree, build.looked_at));
    });
  }

  // Who is pointed to points back, as far as that is no worse than what it points to already.
  void lead_back() {
    std::vector<int64_t> begin(nodes + 1), at;
    for (int64_t node = 0; node < nodes; node++)
      for (int64_t i = 0; i < graph.degree(node); i++) begin[graph.row(node)[i] + 1]++;
    for (int64_t node = 0; node < nodes; node++) begin[node + 1] += begin[node];
    std::vector<int32_t> from(begin[nodes]);
    at.assign(begin.begin(), begin.end() - 1);
    for (int64_t node = 0; node < nodes; node++)
      for (int64_t i = 0; i < graph.degree(node); i++) from[at[graph.row(node)[i]]++] = node;
    each_node(nodes, threads, [&](int64_t node, int64_t thread) {
      Worker &worker = workers[thread];
      worker.candidates.assign(graph.row(node), graph.row(node) + graph.degree(node));
      for (int64_t i = begin[node]; i < begin[node + 1]; i++)
        if (!graph.has(node, from[i])) worker.candidates.push_back(from[i]);
      const bool many = (int64_t)worker.candidates.size() > build.degree;
      graph.set(node, many ? worker.choose(points, node, build.degree, build.looked_at) : worker.candidates);
    });
  }

  // Every key asks for itself; what its walk finds is joined to it, both ways.
  void join() {
    std::vector<int32_t> found(nodes * build.joined, -1);
    each_node(nodes, threads, [&](int64_t node, int64_t thread) {
      Worker &worker = workers[thread];
      worker.key.resize(keys.dim);
      widen_row(keys.row(node), keys, worker.key.data());
      worker.query.set(worker.key.data(), keys);
      worker.walker.walk(
          graph, keys, [&](int32_t, const char *row) { return dot(worker.query.numbers, row, keys); }, entries, entry_count, nodes,
          build.width);
      worker.candidates.clear();
      for (const Walker::Place &place : worker.walker.beam)
        if (place.node != node && !graph.has(node, place.node)) worker.candidates.push_back(place.node);
      const std::vector<int32_t> &chosen = worker.choose(points, node, build.joined, build.looked_at);
      std::copy(chosen.begin(), chosen.end(), found.begin() + node * build.joined);
    });
    for (int64_t node = 0; node < nodes; node++)
      for (int64_t i = 0; i < build.joined && found[node * build.joined + i] >= 0; i++) {
        const int32_t other = found[node * build.joined + i];
        if (!graph.has(node, other)) graph.add(node, other, build.links);
        if (!graph.has(other, node)) graph.add(other, node, build.links);
      }
  }

  // Afterwards a walk from the entries can come to every node.
  void reach_all() {
    std::vector<char> reached(nodes);
    std::vector<int32_t> way;
    const auto go = [&](int32_t node) {
      if (!reached[node]) reached[node] = 1, way.push_back(node);
    };
    size_t done = 0;
    const auto go_on = [&] {
      for (; done < way.size(); done++)
        for (int64_t i = 0; i < graph.degree(way[done]); i++) go(graph.row(way[done])[i]);
    };
    for (int64_t i = 0; i < entry_count && entries[i] >= 0; i++) go(entries[i]);
    go_on();
    for (int32_t node = 0; node < nodes; node++) {
      if (reached[node]) continue;
      int32_t host = -1;
      for (int64_t i = 0; i < graph.degree(node) && host < 0; i++) {
        const int32_t other = graph.row(node)[i];
        if (reached[other] && graph.degree(other) < graph.slots) host = other;
      }
      for (int32_t other = node - 1; other >= 0 && host < 0; other--)
        if (reached[other] && graph.degree(other) < graph.slots) host = other;
      for (int32_t other = node + 1; other < nodes && host < 0; other++)
        if (reached[other] && graph.degree(other) < graph.slots) host = other;
      graph.add(host, node, graph.slots);  // there is one: `links` is below `slots`
      go(node);
      go_on();
    }
  }
};

}  // namespace

// Fills rows and entries.  Returns 0, or 1 where there is no memory.
KVC_EXPORT int64_t kvc_graph_build(const KvcGraphs *graphs, const KvcGraphBuild *build) try {
  for (int64_t head = 0; head < graphs->heads; head++)
    for (int64_t graph = 0; graph < graphs->graphs; graph++) Builder(*graphs, *build, head, graph).run();
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

// Nodes from `from` on join the graphs: they lead to the nearest nodes, as the metric measures, and some of these lead to them.
KVC_EXPORT int64_t kvc_graph_add(const KvcGraphs *graphs, const KvcGraphBuild *build, int64_t from) try {
  each_on_threads(graphs->heads * graphs->graphs, graphs->threads, [&](int64_t index, int64_t) {
    const int64_t head = index / graphs->graphs, dim = graphs->dim, all = graphs->heads * graphs->graphs;
    const Keys keys = {graphs->parts + head * graphs->part_count, dim, graphs->type};
    const Graph graph(*graphs, head, index % graphs->graphs);
    const float *const metric = graphs->metric + index * dim * dim, *const mean = graphs->mean + index * dim;
    const auto norm = [&](int64_t node) -> float & { return graphs->norms[node * all + index]; };
    Worker worker;
    std::vector<float> centred(dim), image(dim);
    struct Seen {  // a key in the metric: its product with another key, less `shift`, is that of the centred ones
      Query query;
      float shift, norm;
    };
    const auto look = [&](int64_t node, Seen &seen) {
      widen_row(keys.row(node), keys, centred.data());
      for (int64_t d = 0; d < dim; d++) centred[d] -= mean[d];
      std::fill(image.begin(), image.end(), 0);
      for (int64_t i = 0; i < dim; i++)
        for (int64_t j = 0; j < dim; j++) image[j] += centred[i] * metric[i * dim + j];
      seen.shift = seen.norm = 0;
      for (int64_t d = 0; d < dim; d++) seen.shift += image[d] * mean[d], seen.norm += image[d] * centred[d];
      seen.query.set(image.data(), keys);
    };
    const auto nearness = [&](const Seen &seen, int32_t other, const char *row) {  // the squared distance, less than zero
      const float score = 2 * (dot(seen.query.numbers, row, keys) - seen.shift) - norm(other) - seen.norm;
      return score == score ? score : -kInfinity;
    };
    Seen own;
    std::vector<Seen> kept(build->degree);
    for (int64_t node = from; node < graphs->nodes; node++) {
      look(node, own);
      norm(node) = own.norm == own.norm ? own.norm : kInfinity;
      worker.walker.walk(
          graph, keys, [&](int32_t other, const char *row) { return nearness(own, other, row); },
          graphs->entries + index * graphs->entry_count, graphs->entry_count, node, build->width);
      worker.candidates.clear();
      for (const Walker::Place &place : worker.walker.beam) worker.candidates.push_back(place.node);
      worker.pruner.choose(
          worker.candidates, build->degree, build->looked_at, [&](int32_t other) { return nearness(own, other, keys.row(other)); },
          [&](size_t place, int32_t other) { return nearness(kept[place], other, keys.row(other)); },
          [&](size_t place, int32_t other) { look(other, kept[place]); });
      graph.set(node, worker.pruner.chosen);
      int64_t linked = 0;
      for (size_t i = 0; i < worker.pruner.sorted.size() && linked < build->joined; i++)
        linked += graph.add(worker.pruner.sorted[i].node, node, graph.slots);
      for (int64_t other = node - 1; !linked; other--) linked = graph.add(other, node, graph.slots);  // one has room: each brings some
    }
  });
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

// The k best nodes that walks find, found[heads][queries][k], ascending; k <= nodes, width >= k.  walked[heads][queries][2]: keys read and
// nodes gone on from.  Query q of a head walks through graph q * graphs / queries.
KVC_EXPORT int64_t kvc_graph_search(const KvcGraphs *graphs, const float *query, int64_t queries, int64_t k, int64_t width, int64_t *found,
                                    int64_t *walked) try {
  std::vector<Walker> walkers(graphs->threads);
  each_on_threads(graphs->heads * queries, graphs->threads, [&](int64_t index, int64_t thread) {
    const int64_t head = index / queries, number = index % queries * graphs->graphs / queries;
    const Keys keys = {graphs->parts + head * graphs->part_count, graphs->dim, graphs->type};
    Walker &walker = walkers[thread];
    Query numbers;
    numbers.set(query + index * graphs->dim, keys);
    walker.walk(
        Graph(*graphs, head, number), keys, [&](int32_t, const char *row) { return dot(numbers.numbers, row, keys); },
        graphs->entries + (head * graphs->graphs + number) * graphs->entry_count, graphs->entry_count, graphs->nodes, width);
    int64_t *const to = found + index * k;
    for (int64_t i = 0; i < k; i++) to[i] = i < (int64_t)walker.beam.size() ? walker.beam[i].node : INT64_MAX;
    std::sort(to, to + k);
    walked[index * 2] = walker.scanned, walked[index * 2 + 1] = walker.hops;
  });
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

// The exact ones: nearest[heads][queries][k], best first, -1 where there are fewer; limits[queries] as of a build.
KVC_EXPORT int64_t kvc_graph_exact(const KvcGraphs *graphs, const float *query, const int64_t *limits, int64_t queries, int64_t k,
                                   int32_t *nearest) try {
  for (int64_t head = 0; head < graphs->heads; head++) {
    const Keys keys = {graphs->parts + head * graphs->part_count, graphs->dim, graphs->type};
    const auto found = find_nearest(keys, query + head * queries * graphs->dim, limits, queries, k, graphs->threads);
    std::copy(found.begin(), found.end(), nearest + head * queries * k);
  }
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}
