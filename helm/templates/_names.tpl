{{- define "lowbit.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 45 characters: suffixes such as -quantize-1a2b3c4d must fit in a label. */}}
{{- define "lowbit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains (include "lowbit.name" .) .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lowbit.name" .) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What the release's pods have in common; the component tells server, quantize and test apart. */}}
{{- define "lowbit.releaseLabels" -}}
app.kubernetes.io/name: {{ include "lowbit.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lowbit.selectorLabels" -}}
{{ include "lowbit.releaseLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "lowbit.commonLabels" -}}
{{ include "lowbit.releaseLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lowbit.labels" -}}
{{ include "lowbit.commonLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* name, namespace and labels of a resource of the server. */}}
{{- define "lowbit.metadata" -}}
name: {{ include "lowbit.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lowbit.labels" . | nindent 2 }}
{{- end -}}

{{- define "lowbit.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lowbit.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- $variant := ternary "gpu" "cpu" (gt (int .Values.gpu.count) 0) -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s-%s" .Chart.AppVersion $variant) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") -}}
{{- end -}}

{{/* Empty where everybody is let in. */}}
{{- define "lowbit.keysSecret" -}}
{{- if .Values.apiKeys.entries -}}
{{- printf "%s-api-keys" (include "lowbit.fullname" .) -}}
{{- else -}}
{{- .Values.apiKeys.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.startupBudgetS" -}}
{{- if kindIs "invalid" .Values.startup.budgetS -}}
{{- add 300 (mul 30 (int .Values.checkpoint.sizeGib)) -}}
{{- else -}}
{{- int .Values.startup.budgetS -}}
{{- end -}}
{{- end -}}

{{/* Not empty where one model spans several nodes. */}}
{{- define "lowbit.multiNode" -}}
{{- if gt (int .Values.parallel.nodes) 1 }}true{{ end -}}
{{- end -}}

{{/* What is scaled. A LeaderWorkerSet makes a headless Service of its own name, which must not be ours. */}}
{{- define "lowbit.workload" -}}
{{ include "lowbit.fullname" . }}{{ if include "lowbit.multiNode" . }}-nodes{{ end }}
{{- end -}}

{{- define "lowbit.scaleTarget" -}}
{{- if include "lowbit.multiNode" . -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "lowbit.workload" . }}
{{- end -}}

{{/* Selector of leaders and followers. */}}
{{- define "lowbit.everyNode" -}}
matchLabels:
  {{- include "lowbit.releaseLabels" . | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [server, follower]}
{{- end -}}

{{- define "lowbit.tensorSize" -}}
{{- if kindIs "invalid" .Values.parallel.tensorSize }}{{ max 1 (int .Values.gpu.count) }}{{ else }}{{ int .Values.parallel.tensorSize }}{{ end -}}
{{- end -}}

{{- define "lowbit.pipelineSize" -}}
{{- if kindIs "invalid" .Values.parallel.pipelineSize }}{{ int .Values.parallel.nodes }}{{ else }}{{ int .Values.parallel.pipelineSize }}{{ end -}}
{{- end -}}
